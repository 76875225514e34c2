"""The toy set: rendered landmarks in the official layouts, and its contact sheet (see `make_toy`)."""

from superglobal.toy.make import VERSION, make_toy
from superglobal.toy.plan import SIZES
from superglobal.toy.sheet import read_photos, write_sheet

__all__ = ["SIZES", "VERSION", "make_toy", "read_photos", "write_sheet"]
