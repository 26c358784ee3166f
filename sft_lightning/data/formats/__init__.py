"""Formats that turn a row of a file into a prompt and a response.

They may import what data may; start with base.py.
"""
