"""Records from Kafka and offsets back: partitions, watermarks, retries, transactions."""
