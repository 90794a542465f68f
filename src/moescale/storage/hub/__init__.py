"""Repos on the Hub: sources, destinations and the client."""
