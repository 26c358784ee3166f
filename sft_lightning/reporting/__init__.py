"""Read the folder of a run, and write its report, its plots and its tables.

It may import evaluation and everything below, and trains nothing. Start with ``page.py``; ``run_files.py`` reads what
the other files show.
"""
