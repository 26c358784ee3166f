"""The LightningModule, the LightningDataModule, and what happens in each optimizer step.

It may import reporting and the rooms below; start with module.py.
"""
