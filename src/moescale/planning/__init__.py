"""The one place where everything is decided, before a weight is read: one frozen plan."""
