"""Loggers: metrics.csv, and tables of samples for TensorBoard and W&B.

They may import what training may; start with metrics_csv.py.
"""
