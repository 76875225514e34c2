"""Data sets by one command: loaded, gone on with, checked, unpacked into the layouts that the loaders read."""
