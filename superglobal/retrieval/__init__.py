"""Descriptor store, search, reranking, metrics. Nothing here imports Lightning or Hydra."""
