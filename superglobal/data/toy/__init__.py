"""The toy set: rendered landmarks in the official layouts, and its contact sheet (see `make_toy`)."""

from superglobal.data.toy.make import VERSION, make_toy
from superglobal.data.toy.plan import SIZES
from superglobal.data.toy.sheet import read_photos, write_sheet

__all__ = ["SIZES", "VERSION", "make_toy", "read_photos", "write_sheet"]
