"""Routes: which objects are extracted how, and where their records go."""
