"""Evaluate models: generate, grade, count, and compare two evaluations.

It may import generation, grading, data and everything below, and not Lightning. Start with ``evaluate.py``.
"""
