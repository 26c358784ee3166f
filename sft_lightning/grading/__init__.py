"""Graders of answers, with mathematics in processes of their own.

It may import only errors; start with graders.py.
"""
