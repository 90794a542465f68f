"""Where checkpoints are read and written; no knowledge of experts."""
