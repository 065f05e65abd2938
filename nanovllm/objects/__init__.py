"""How object stores are spoken to: one S3 client, fetching, errors."""
