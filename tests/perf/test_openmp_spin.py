"""How long waiting threads spin: what is set before torch is loaded, and what is said of it."""

import json
import os
import subprocess
import sys

import pytest

from gptexp.perf.openmp_spin import SPIN_COUNT

NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")

PROGRAM = """
import json, os, sys
from gptexp.perf import openmp_spin
if "late" in sys.argv:
    import torch
openmp_spin.prepare()
import torch
print(json.dumps([os.environ.get("GOMP_SPINCOUNT"), openmp_spin.active()]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "how", "expected"),
    [
        ({}, "early", str(SPIN_COUNT)),
        ({"GOMP_SPINCOUNT": "7"}, "early", "7"),
        ({"GOMP_SPINCOUNT": "7"}, "late", "7"),
        ({"OMP_WAIT_POLICY": "passive"}, "early", None),
        ({}, "late", None),  # the runtime has read its environment
    ],
)
def test_threads_that_wait_let_others_work(given: dict[str, str], how: str, expected: str | None) -> None:
    env = {name: value for name, value in os.environ.items() if name not in NAMES} | given
    command = [sys.executable, "-c", PROGRAM, how]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    found, active = json.loads(done.stdout)
    assert found == expected
    assert active == (expected if sys.platform == "linux" else None)
