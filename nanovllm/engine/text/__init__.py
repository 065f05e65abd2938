"""Requests to token ids, and tokens to text."""
