"""Probes, signals and the checks of topics."""
