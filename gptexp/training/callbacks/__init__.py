"""Callbacks: what a run records, saves and shows, and what stops it."""
