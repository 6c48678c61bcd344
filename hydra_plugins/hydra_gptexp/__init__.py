"""The Hydra sweepers of gptexp, here because Hydra looks for plugins in this package alone."""
