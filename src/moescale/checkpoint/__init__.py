"""The format: safetensors headers, dtypes, and the rewriting of a byte stream."""
