"""The worker: jobs from Kafka, images from S3, results to Kafka; and the tools around it."""
