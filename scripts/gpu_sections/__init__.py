"""The sections of scripts/gpu_report.py, one module each with `main(report)`."""
