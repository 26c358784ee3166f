"""Pages, plots and tables from the files of finished and running runs.

It may import checkpointing and the rooms below; start with page.py.
"""
