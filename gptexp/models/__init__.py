"""The models and their parts: pure torch, readable without knowing Lightning or Hydra."""

from gptexp import perf

perf.prepare()  # what must be settled before torch is loaded, as the modules of this folder do

# Each registers its components.
from gptexp.models import activations, baselines, batch_norms, gpt, norms, placements, positions, power_norm  # noqa: E402, F401
