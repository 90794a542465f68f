"""The GGUF format: header, tensor types, and edits of the header."""
