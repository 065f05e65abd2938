"""How much a worker holds at once, and who is served next."""
