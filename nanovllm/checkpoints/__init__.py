"""From a name to tensors: hub cache, aliases, configuration, safetensors, the shipped checkpoint."""
