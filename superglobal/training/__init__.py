"""Train a retrieval network."""
