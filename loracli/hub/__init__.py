"""The only room that reads from the Hub: adapters and bases by reference in, pinned directories out."""
