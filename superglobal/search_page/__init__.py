"""Web page on which you search a data set for images that are similar to a photo."""
