"""Access to object stores: one S3 client, fetching, errors."""
