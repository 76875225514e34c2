"""Files, processes, precision, progress and provenance."""
