"""Encoded images to pixels, within limits, in processes that may die."""
