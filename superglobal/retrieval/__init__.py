"""Descriptor store, search, reranking, metrics, reports. Nothing here imports Lightning or Hydra."""
