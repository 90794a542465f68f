"""Kinds of routers, and the gate weights that they compute."""
