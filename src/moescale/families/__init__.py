"""What a checkpoint is made of: which tensors are routed experts, and what the config says."""
