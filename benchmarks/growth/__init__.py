"""What a step, a prompt, a job costs as numbers grow: `python -m benchmarks.growth --help`."""
