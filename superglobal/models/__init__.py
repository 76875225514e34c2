"""Networks that turn images into descriptors. These modules import neither Lightning nor Hydra."""
