"""Networks: image -> feature map -> descriptor. Nothing here imports Lightning or Hydra."""
