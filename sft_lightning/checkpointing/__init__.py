"""Save, verify, find and resume checkpoints, and keep track of the files of a run folder.

It may import models, data, Lightning and everything below. Start with ``callback.py``, which decides when to save;
``folder.py`` is the layout on disk.
"""
