"""Turn batches of prompts into tokens: batching, sampling, stopping, the key-value cache and the loop over steps.

Start with ``loop.py``. ``hf_generate.py`` serves the models that the loop cannot run.
"""
