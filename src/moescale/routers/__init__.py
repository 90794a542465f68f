"""Kinds of routers, and the weights that they give."""
