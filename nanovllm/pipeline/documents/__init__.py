"""From the texts of pages and a model's output to document records. No Kafka, no S3, no torch."""
