"""Local directories as sources and destinations."""
