"""Memory that a step frees is there for the next."""

import subprocess
import sys

import pytest

MEASURE = """
import resource, sys, torch
from gptexp.models.gpt import GPT
from gptexp.models.settings import GPTConfig
from gptexp.training.memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
model, ids = GPT(GPTConfig()), torch.zeros(12, 64, dtype=torch.long)
def step():
    model(ids).square().mean().backward()
    model.zero_grad()
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_memory_is_not_mapped_anew_at_every_step() -> None:
    default, kept = (int(subprocess.run([sys.executable, "-c", MEASURE, how], check=True, capture_output=True,
                                        text=True).stdout) for how in ("default", "kept"))  # fmt: skip
    assert 4 * kept < default
