"""A plain LoRA made of an adapter that is none: of what it changes in the base model's weights."""
