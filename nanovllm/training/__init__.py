"""Training of the projector and of the shipped checkpoint, and its synthetic data."""
