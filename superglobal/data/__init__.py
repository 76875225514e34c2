"""Images and evaluation sets."""
