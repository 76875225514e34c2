"""Benchmarks that scripts/bench.py runs. Each is a module with a function `main(argv)`; `common` is shared code."""
