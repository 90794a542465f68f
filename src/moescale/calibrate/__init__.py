"""Runs the model over a text, for the rule ``measured``; torch is imported in here only."""
