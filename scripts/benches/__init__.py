"""Benchmarks of scripts/bench.py. Each module has a function `main(argv)`."""
