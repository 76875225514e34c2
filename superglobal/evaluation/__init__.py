"""Evaluate a network on a data set: extract descriptors, search, rerank and compute scores."""
