"""The GGUF format: header, types of tensors, and how a header changes."""
