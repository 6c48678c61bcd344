"""Memory that a step frees is there for the next."""

import subprocess
import sys

import pytest

MEASURE = """
import resource, sys, torch
if sys.argv[1] == "kept":
    from gptexp.training.memory import keep_freed_memory
    keep_freed_memory()
def step():
    held = [torch.ones(2**18) for _ in range(16)]  # 16 MiB
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
    assert 10 * kept < default
