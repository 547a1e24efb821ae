"""The fit: the base model, the adapters attached to it, the loss on scored tokens, and the search for mixing
weights."""
