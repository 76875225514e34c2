"""Read images, load data sets, and check that their files are complete."""
