"""The command line: each command calls the library's function of the same name. Importing it imports no torch.

options.py has the options and how they are read, choosing.py the selectors; selecting.py, measuring.py and looking.py
the commands; entry.py the command ``surgery`` itself.
"""

from surgery.cli.entry import app, main

__all__ = ["app", "main"]
