"""The plan of each optimizer step, and the loaders that collate its micro-batches.

It may import what data may; start with plan.py.
"""
