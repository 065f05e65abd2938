"""Faults that concern more than one job: circuit breaker, backoff, limits."""
