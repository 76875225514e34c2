"""Evaluation of a network on a data set, from images to scores."""
