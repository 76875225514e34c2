"""Write results as files, tables, charts and figures. No module of this package imports Lightning or Hydra."""
