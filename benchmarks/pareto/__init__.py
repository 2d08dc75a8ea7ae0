"""Every selector beside everything people use today: ``python -m benchmarks.pareto``."""
