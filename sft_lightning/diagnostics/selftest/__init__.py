"""Comparisons of gradients and of resumed runs on the user's own model and rows.

It may import what diagnostics may; start with gradients.py.
"""
