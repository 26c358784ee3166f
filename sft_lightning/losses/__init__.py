"""Losses of label tokens, computed without the full logits, and the guide's loss functions.

It may import data and the rooms below; start with base.py and token_loss.py.
"""
