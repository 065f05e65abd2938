"""Settings: fields with their types, defaults and descriptions."""
