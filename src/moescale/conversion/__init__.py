"""Carries out a plan: writes the output, says what it is, and proves it."""
