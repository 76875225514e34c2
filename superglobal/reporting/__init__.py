"""What is written and drawn of results: files, tables, charts, pictures. Nothing here imports Lightning or Hydra."""
