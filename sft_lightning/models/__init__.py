"""Models: loading, precision, attention, compilation and FLOPs.

It may import losses, generation and the rooms below; start with loading.py.
"""
