"""Measurements that print a table; each compares with a peer in the same run."""
