"""The parts of ``benchmarks/gpu.py``, each of which can run alone."""
