"""Routing: what brings events and objects to the topics where they are answered."""
