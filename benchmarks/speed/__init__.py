"""What the operations cost, each beside the least that could be done."""
