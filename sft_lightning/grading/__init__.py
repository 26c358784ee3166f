"""Graders of answers, with mathematics in processes of their own.

It may import system and errors; start with graders.py.
"""
