"""Where a checkpoint is: sources are read, destinations written; neither knows of experts."""
