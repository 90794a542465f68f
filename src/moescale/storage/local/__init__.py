"""Local directories: sources, destinations and what is on disk."""
