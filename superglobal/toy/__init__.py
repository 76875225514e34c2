"""Render the toy data set: synthetic images of landmarks, in the file layouts of the official data sets."""

from superglobal.toy.make import VERSION, make_toy
from superglobal.toy.plan import SIZES
from superglobal.toy.sheet import read_photos, write_sheet

__all__ = ["SIZES", "VERSION", "make_toy", "read_photos", "write_sheet"]
