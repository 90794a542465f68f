"""The safetensors format: headers, and the index of a set of shards."""
