"""Search page in the browser, which finds the images of a data set that are similar to a photo."""
