"""Checks that run beside training: check of the data, selftest of the steps, replay of a step that was not finite.

It may import training and the rooms below; start with check/check.py.
"""
