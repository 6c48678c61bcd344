"""A sweep as one object: a grid or a search, its jobs, and its live table."""
