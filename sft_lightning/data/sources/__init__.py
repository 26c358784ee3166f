"""Sources that yield the rows of data files.

They may import only errors; start with files.py.
"""
