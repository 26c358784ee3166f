"""The commands that are not Lightning's own, one file each, with a function run(args) that returns the exit code.

They may import every other room, inside functions, so that --help stays fast; start with check.py.
"""
