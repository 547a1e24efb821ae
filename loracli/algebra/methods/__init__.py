"""Ways to compose, one in each file."""
