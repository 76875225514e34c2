"""Reranking of shortlists. These modules import neither Lightning nor Hydra."""
