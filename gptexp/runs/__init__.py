"""A run directory as one object, and the files in it."""
