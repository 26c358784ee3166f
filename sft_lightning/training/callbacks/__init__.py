"""Callbacks that log, evaluate and write the files of a run.

They may import what training may; start with defaults.py, which lists those that every run gets.
"""
