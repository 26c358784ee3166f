"""The quickstart's data set, model and tokenizer, made without downloads.

It may import data and the rooms below; start with arithmetic.py.
"""
