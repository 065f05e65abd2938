"""From the texts of pages and a model's output to document records; finished pages in a store. No Kafka, no torch."""
