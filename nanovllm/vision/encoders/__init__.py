"""Vision towers with their projectors: pixels to embeddings."""
