"""A search page in the browser: photo_search.py knows no browser, the other files make the page of it.

Gradio (extra `[demo]`) is imported where a page is made, not here.
"""
