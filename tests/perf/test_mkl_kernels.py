"""MKL's kernels: the library that is made, what it changes, what is said of it, and that products stay right."""

import ctypes
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptexp.perf.mkl_kernels import gains, shared_library
from gptexp.records import METRICS
from gptexp.runs import Run
from tests.conftest import TINY, finish, spawn, timeless

CPUINFO = Path("/proc/cpuinfo")
NEEDED = CPUINFO.exists() and platform.machine() == "x86_64" and gains(CPUINFO.read_text().partition("\n\n")[0])

linux = pytest.mark.skipif((sys.platform, platform.machine()) != ("linux", "x86_64"), reason="Linux on x86-64")
needed = pytest.mark.skipif(not NEEDED, reason="has no other kernels")

NAMES = st.lists(st.from_regex("[a-z_][a-z0-9_]{0,40}", fullmatch=True), min_size=2, max_size=2, unique=True)


@linux
@settings(max_examples=20, deadline=None)
@given(names=NAMES, value=st.integers(0, 2**32 - 1), calls=st.integers(0, 5))
def test_a_library_counts_the_calls_of_its_function_and_answers(
    names: list[str], value: int, calls: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("library") / "made.so"
    path.write_bytes(shared_library(*(name.encode() for name in names)))
    library = ctypes.CDLL(str(path))
    function, data = library[names[0]], (ctypes.c_uint32 * 2).in_dll(library, names[1])
    function.restype = ctypes.c_uint32
    assert list(data) == [0, 0]
    data[1] = value
    assert [function() for _ in range(calls)] == [value] * calls
    assert list(data) == [calls, value]


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("vendor_id : AuthenticAMD\nflags : fma sse2 avx avx2", True),
        ("vendor_id : HygonGenuine\nflags : fma sse2 avx avx2", True),
        ("vendor_id : GenuineIntel\nflags : fma sse2 avx avx2 avx512f", False),
        ("vendor_id : AuthenticAMD\nflags : sse2 avx", False),  # its kernels would be illegal instructions
        ("vendor_id : AuthenticAMD\nflags : avx2x fma4", False),
        ("", False),
    ],
)
def test_it_is_for_other_makers_processors_with_avx2(cpuinfo: str, expected: bool) -> None:
    assert gains(cpuinfo) == expected


PROGRAM = """
import json, sys
from gptexp.perf import mkl_kernels
if "late" in sys.argv:
    import torch
if "absent" in sys.argv:  # from a Python that was built for an older system
    import os
    vars(os).pop("memfd_create", None)
if "unasked" in sys.argv:  # as by a version of MKL that asks another question
    mkl_kernels.QUESTION = b"mkl_serv_question_of_another_version"
mkl_kernels.prepare()
import torch
if "product before" in sys.argv:
    torch.ones(2, 2) @ torch.ones(2, 2)
problems = [mkl_kernels.choose("unwanted" not in sys.argv)] if "unchosen" not in sys.argv else []
torch.manual_seed(0)
worst = 0.0
for n, k, m in ((768, 128, 512), (1, 128, 384), (37, 5, 3), (64, 64, 64), (1000, 300, 7)):
    a, b = torch.randn(n, k), torch.randn(k, m)
    for left, right in ((a, b), (b.t(), a.t()), (a, b.t().contiguous().t())):
        exact = left.double() @ right.double()
        bound = left.double().abs() @ right.double().abs()
        worst = max(worst, ((left @ right - exact).abs() / bound).max().item())
print(json.dumps([mkl_kernels.active(), worst, problems]))
"""


@pytest.mark.parametrize(
    "how",
    ["", "unwanted", "unchosen",
     *(pytest.param(how, marks=pytest.mark.slow) for how in ("late", "absent", "product before", "unasked"))],
)
def test_products_are_right_and_what_is_active_is_known(how: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], check=True, capture_output=True, text=True)
    active, worst, problems = json.loads(done.stdout)
    assert active == (NEEDED and how == "")
    assert problems in ([], [None])
    assert worst < 2**-23 * 8  # of the sum of the absolute products; a product of 1,000 terms has some roundings


CHOICES = """
import json, sys
from gptexp.perf import mkl_kernels
mkl_kernels.prepare()
import torch
given = []
for choice in sys.argv[1:]:
    if choice == "product":
        torch.ones(2, 2) @ torch.ones(2, 2)
    else:
        given.append(mkl_kernels.choose(choice == "true"))
print(json.dumps([given, mkl_kernels.active()]))
"""


@pytest.mark.slow
@needed
@pytest.mark.parametrize(
    ("choices", "refused", "active"),
    [
        ("true product true", "", True),
        ("false product false", "", False),
        ("false true product", "", True),  # MKL has not asked yet
        ("true product false", "false", True),
        ("false product true", "true", False),
        ("false product true false", "true", False),
    ],
)
def test_a_choice_stands_from_the_first_product_on(choices: str, refused: str, active: bool) -> None:
    command = [sys.executable, "-c", CHOICES, *choices.split()]
    given, is_active = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    problems = [problem for problem in given if problem]
    assert is_active == active
    assert len(problems) == bool(refused)
    assert all(problem.startswith(f"hardware.fast_mkl={refused}: an earlier run") for problem in problems)


@pytest.mark.slow
@needed
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


@pytest.mark.slow
@pytest.mark.exhaustive
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
