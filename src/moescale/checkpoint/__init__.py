"""Checkpoint formats: arithmetic, edits, and the rewriting of a byte stream."""
