"""What held-out records say, with error bars."""
