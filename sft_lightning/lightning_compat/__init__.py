"""All access to Lightning's internals, so that an upgrade of Lightning touches one room.

It may import system, grading, optim and distributed; start with trainer.py.
"""
