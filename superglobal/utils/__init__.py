"""Helpers for file access, processes, numerical precision, progress reports and version records."""
