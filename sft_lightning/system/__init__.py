"""Files, disk space, memory and devices.

It may import only errors; start with files.py.
"""
