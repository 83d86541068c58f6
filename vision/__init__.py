"""Models of images, their data, metrics and recipes."""
