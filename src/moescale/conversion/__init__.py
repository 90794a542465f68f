"""Carries out a plan: writes the output with card and provenance, and verifies it."""
