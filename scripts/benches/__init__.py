"""Benchmarks that scripts/bench.py runs.

Each benchmark is a module with a function `main(argv)`. The module `common` contains code that several benchmarks use.
"""
