"""Choosing the pooling and the reranking after training, on a validation set."""
