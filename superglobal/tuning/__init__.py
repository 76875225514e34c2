"""Choose pooling and reranking settings after training, on a validation set."""
