"""``python -m surgery`` is ``surgery``."""

from surgery.cli.entry import main

main()
