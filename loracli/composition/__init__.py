"""What is exported: adapters and what makes one update of theirs, with its origin."""
