"""Choose the settings of pooling and reranking for a trained network on a validation set."""
