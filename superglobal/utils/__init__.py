"""File access, processes, precision, progress and versions."""
