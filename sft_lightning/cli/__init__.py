"""Command line: options, commands and messages.

It may import every other room; start with main.py, which picks the command, or with config.py for an option of fit.
"""
