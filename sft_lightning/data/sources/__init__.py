"""Sources that yield the rows of data files, or rows in memory.

They may import system and errors; start with files.py.
"""
