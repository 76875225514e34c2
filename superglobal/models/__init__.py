"""Networks that compute descriptors of images. These modules import neither Lightning nor Hydra."""
