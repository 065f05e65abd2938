"""Routing: which objects are extracted how, and what brings their events to the topics where they are answered."""
