"""Metrics of the retrieval benchmarks. Nothing here imports Lightning or Hydra."""
