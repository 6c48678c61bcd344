"""MKL's kernels: the library that is made, what it changes, and that products stay right."""

import ctypes
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptexp.records import METRICS
from gptexp.runs import Run
from gptexp.training.kernels import gains, shared_library
from tests.conftest import TINY, finish, spawn, timeless

CPUINFO = Path("/proc/cpuinfo")
NEEDED = CPUINFO.exists() and platform.machine() == "x86_64" and gains(CPUINFO.read_text().partition("\n\n")[0])

linux = pytest.mark.skipif((sys.platform, platform.machine()) != ("linux", "x86_64"), reason="Linux on x86-64")


@linux
@settings(max_examples=20, deadline=None)
@given(name=st.from_regex("[a-z_][a-z0-9_]{0,40}", fullmatch=True), value=st.integers(-(2**31), 2**31 - 1))
def test_a_library_exports_its_function(
    name: str, value: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("library") / "made.so"
    path.write_bytes(shared_library(name.encode(), b"\xb8" + value.to_bytes(4, "little", signed=True) + b"\xc3"))
    assert ctypes.CDLL(str(path))[name]() == value


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        ("vendor_id : AuthenticAMD\nflags : fma sse2 avx avx2", True),
        ("vendor_id : HygonGenuine\nflags : fma sse2 avx avx2", True),
        ("vendor_id : GenuineIntel\nflags : fma sse2 avx avx2 avx512f", False),
        ("vendor_id : AuthenticAMD\nflags : sse2 avx", False),  # its kernels would be illegal instructions
        ("vendor_id : AuthenticAMD\nflags : avx2x fma4", False),
        ("", False),
    ],
)
def test_it_is_for_other_makers_processors_with_avx2(about: str, expected: bool) -> None:
    assert gains(about) == expected


PROGRAM = """
import ctypes, json, sys
from gptexp.training.kernels import prepare_kernels
if "late" in sys.argv:
    import torch
if "absent" in sys.argv:  # from a Python that was built for an older system
    import os
    vars(os).pop("memfd_create", None)
done = prepare_kernels("unwanted" not in sys.argv)
import torch
torch.manual_seed(0)
worst = 0.0
for n, k, m in ((768, 128, 512), (1, 128, 384), (37, 5, 3), (64, 64, 64), (1000, 300, 7)):
    a, b = torch.randn(n, k), torch.randn(k, m)
    for left, right in ((a, b), (b.t(), a.t()), (a, b.t().contiguous().t())):
        exact = left.double() @ right.double()
        bound = left.double().abs() @ right.double().abs()
        worst = max(worst, ((left @ right - exact).abs() / bound).max().item())
answer = ctypes.CDLL(None).mkl_serv_intel_cpu_true() if done else None
print(json.dumps([done, prepare_kernels(), worst, answer]))
"""


def _run(*arguments: str) -> list[float]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], check=True, capture_output=True, text=True)
    values: list[float] = json.loads(done.stdout)
    return values


@pytest.mark.parametrize("arguments", [(), ("unwanted",), ("late",), ("absent",)])
def test_products_are_right_to_float32s_last_digits(arguments: tuple[str, ...]) -> None:
    done, again, worst, answer = _run(*arguments)
    assert done == again == (NEEDED and not arguments)
    assert answer == (1 if done else None)
    assert worst < 2**-23 * 8  # of the sum of the absolute products; a product of 1,000 terms has some roundings


@pytest.mark.skipif(not NEEDED, reason="has no other kernels")
@pytest.mark.parametrize("values", ["true,false", "false,true"])
def test_one_process_cannot_have_both(values: str, corpus: Path, tmp_path: Path) -> None:
    first, second = values.split(",")
    sweep = tmp_path / "sweep"
    process = spawn("-m", *TINY, f"data.path={corpus}", f"hardware.fast_mkl={values}", f"hydra.sweep.dir={sweep}",
                    cwd=tmp_path)  # fmt: skip
    code, out, _ = finish(process)
    assert code == 1
    assert f"hardware.fast_mkl={second}: an earlier run of this process had it otherwise" in out
    known = [Run.open(path.parent).info for path in sweep.glob("*/run.json")]
    assert [info["device"]["fast_mkl"] for info in known if info["status"] == "done"] == [first == "true"]


def test_a_run_tells_which_kernels_it_had_and_repeats_with_them(corpus: Path, tmp_path: Path) -> None:
    rows = {}
    for name, setting in (("fast", "true"), ("own", "false"), ("again", "true")):
        process = spawn(
            *TINY, f"data.path={corpus}", f"hardware.fast_mkl={setting}", f"hydra.run.dir={name}", cwd=tmp_path
        )
        assert finish(process)[0] == 0
        run = Run.open(tmp_path / name)
        assert run.info["device"]["fast_mkl"] == (NEEDED and setting == "true")
        rows[name] = timeless(run)
    assert rows["fast"] == rows["again"]
    losses = METRICS.index("val/loss")
    for fast, own in zip(rows["fast"][1:], rows["own"][1:], strict=True):
        assert fast[losses] == own[losses] == "" or float(fast[losses]) == pytest.approx(float(own[losses]), rel=1e-4)
