"""Generators of answers, in this process or from a server.

It may import data and the rooms below; start with transformers_generator.py.
"""
