"""Sinks of outgoing messages: Kafka, object store, JSON lines."""
