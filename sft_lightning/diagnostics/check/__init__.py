"""The check command's findings about data, layouts and memory, before a model is loaded.

It may import what diagnostics may; start with check.py, which runs the parts and collects their findings.
"""
