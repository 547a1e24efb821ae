"""Tensors only: what the low-rank updates are and what can be computed from their factors alone."""
