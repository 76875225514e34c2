"""Download data sets and weights."""
