"""Logits to tokens: parameters, log probabilities, constraints."""
