"""Comparisons with published models need the extra `parity`, and are left out without it."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("transformers") else ["test_transformers.py"]
