"""Makes all decisions of a run before a weight is read, as one frozen plan."""
