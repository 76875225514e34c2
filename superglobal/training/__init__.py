"""Training of a retrieval network."""
