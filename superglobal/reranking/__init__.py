"""Rerank shortlists, which are the top results of a search. These modules import neither Lightning nor Hydra."""
