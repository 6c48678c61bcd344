"""The Hydra sweepers of gptexp."""
