"""The engine as the worker sees it."""
