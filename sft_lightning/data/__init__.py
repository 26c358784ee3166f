"""Rows, tokens and micro-batches.

It may import system, grading, optim and distributed; start with records.py, then token_store.py and batch.py.
"""
