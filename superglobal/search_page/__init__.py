"""A search page in the browser."""
