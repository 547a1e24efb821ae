"""The update folded into the base model's own weights, shard by shard: a model that needs no adapter."""
