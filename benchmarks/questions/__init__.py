"""Scripts that answer one question each, on the lab's checkpoints."""
