"""Checkpoints that transformers loads and that resume bit-equal, and the folder of a run.

It may import models, evaluation and the rooms below; start with callback.py.
"""
