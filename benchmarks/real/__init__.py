"""The real lab: a pretrained language model, damaged by a later stage and repaired: ``python -m benchmarks.real``."""
