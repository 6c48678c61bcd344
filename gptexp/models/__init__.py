"""The models and their parts: pure torch, readable without knowing Lightning or Hydra."""
