"""Attention over segments of a micro-batch, for each kernel.

It may import what models may; start with selection.py, which chooses the kernel, and kernels.py, which lists them.
"""
