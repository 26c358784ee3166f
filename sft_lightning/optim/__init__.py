"""Optimizers and learning-rate schedules.

It may import only errors; start with factory.py.
"""
