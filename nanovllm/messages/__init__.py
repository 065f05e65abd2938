"""Messages: jobs, results, metrics and dead letters, and their bytes. No Kafka, no torch."""
