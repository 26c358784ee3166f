"""Collectives and FSDP2 sharding.

It may import only errors; start with collectives.py.
"""
