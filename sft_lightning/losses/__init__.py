"""Losses of label tokens, computed without the full logits, and loss functions for training loops of your own.

It may import data and the rooms below; start with base.py.
"""
