"""Outgoing messages and where they go: Kafka, JSON lines."""
