"""``python -m benchmarks.pareto``: see ``comparison``."""

from benchmarks.pareto.comparison import main

main()
