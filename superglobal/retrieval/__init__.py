"""Descriptor stores, search, exact ranks and whitening. These modules import neither Lightning nor Hydra."""
