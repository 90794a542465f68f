"""Knows model types and tensor formats: finds the routed experts and reads the config."""
