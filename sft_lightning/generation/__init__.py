"""Generate answers to prompts, with a model in this process or with a server.

It may import data, distributed, system and errors. Start with ``base.py``, the contract of a generator; ``decoding`` is
what the generator in this process is made of.
"""
