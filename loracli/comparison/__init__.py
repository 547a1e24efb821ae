"""Ways to compose the same adapters, measured on the same records."""
