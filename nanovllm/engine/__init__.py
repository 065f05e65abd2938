"""The engine: requests to text. Import its modules by name; importing this package loads nothing."""
