"""Helpers for files, processes, numerical precision, progress and versions."""
