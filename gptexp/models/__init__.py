"""The models and their parts: pure torch, readable without knowing Lightning or Hydra."""

from gptexp import perf

perf.prepare()  # what must be settled before torch is loaded, as the modules of this folder do

# Each registers its components.
from gptexp.models import (  # noqa: E402
    activations,  # noqa: F401
    baselines,  # noqa: F401
    batch_norms,  # noqa: F401
    counts,  # noqa: F401
    gpt,  # noqa: F401
    norms,  # noqa: F401
    placements,  # noqa: F401
    positions,  # noqa: F401
    power_norm,  # noqa: F401
)
