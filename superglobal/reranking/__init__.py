"""Reranking of shortlists. Nothing here imports Lightning or Hydra."""
