"""gptexp: a laboratory for small GPTs. Importing it loads neither torch nor lightning."""

__version__ = "0.1.0"
