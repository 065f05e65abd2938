"""Paths of the user's guide; the code lives in the rooms."""
