"""A scheduled batch through the model: weights, KV memory, graphs."""
