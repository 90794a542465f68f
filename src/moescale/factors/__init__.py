"""How much: pure functions from router facts or samples to factors."""
