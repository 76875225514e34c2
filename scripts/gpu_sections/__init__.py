"""Sections of the report that scripts/gpu_report.py writes. Each section is a module with a function `main(report)`."""
