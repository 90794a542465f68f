"""Repos on the Hub as sources and destinations."""
