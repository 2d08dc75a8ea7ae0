"""How sure it is: what was tried to break it, and what happened."""
