"""Documents: finished pages, and what becomes of them."""
