"""What goes out: one adapter directory that servers read alike, with a certificate, a card, and deterministic bytes."""
