"""The decoding loop of TransformersGenerator and its parts.

It may import what generation may; start with loop.py.
"""
