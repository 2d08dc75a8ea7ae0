"""``python -m surgery.cli`` is ``surgery``."""

from surgery.cli.entry import main

main()
