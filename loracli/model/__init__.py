"""The base model: found, placed, loaded, with the adapters attached to it, and its loss on scored tokens."""
