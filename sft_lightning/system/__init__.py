"""The machine under a run: files, disk space, memory and the speed of devices, and texts that identify objects.

It imports the package's errors and nothing else of it. Start with ``files.py``: every file and folder that must not be
half-written goes through it.
"""
