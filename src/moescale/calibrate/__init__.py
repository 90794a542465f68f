"""Runs the model over a text, for the rules ``measured`` and ``fitted`` and for losses.

Torch is imported only in this package.
"""
