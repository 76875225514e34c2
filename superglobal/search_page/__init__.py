"""Search page in the browser: find the images of a data set that are similar to a photo."""
