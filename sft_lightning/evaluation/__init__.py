"""Evaluation of generated answers: rates, intervals and paired comparisons.

It may import generation and the rooms below; start with evaluate.py.
"""
