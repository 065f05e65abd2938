"""What can be set: fields with their types, defaults and descriptions."""
