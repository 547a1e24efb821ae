"""What was written, held against what it was made of: every tensor computed again from the recorded ingredients."""
