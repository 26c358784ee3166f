"""Grade responses against ground truths, with time limits that hold for any text.

It may import system and errors. Start with ``base.py``, the contract of a grader, and ``graders.py``; a new grader is a
class there and a name in the root of the package.
"""
