"""Where rows come from: JSONL and Parquet files. Imports only ``errors``. Start with ``files.py``."""
