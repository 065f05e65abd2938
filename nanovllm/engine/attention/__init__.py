"""Attention over paged keys and values: one interface, one backend a file."""
