"""Where a checkpoint is: sources to read from and sinks to write to; they know no experts."""
