"""Answers of a base model, of adapters, and of what they make together."""
