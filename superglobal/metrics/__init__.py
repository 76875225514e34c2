"""Metrics of the retrieval benchmarks. These modules import neither Lightning nor Hydra."""
