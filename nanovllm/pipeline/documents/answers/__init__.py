"""Answers of document models: the forms that they are published in, read into Markdown."""
