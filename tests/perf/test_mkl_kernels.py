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
from gptexp.runs.files import METRICS
from gptexp.runs.run import Run
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
import json, os, sys
from gptexp.perf import mkl_kernels
problems, worst = [], 0.0
for word in sys.argv[1:]:
    if word == "absent":  # from a Python that was built for an older system
        vars(os).pop("memfd_create", None)
    elif word == "unasked":  # as by a version of MKL that asks another question
        mkl_kernels.QUESTION = b"mkl_serv_question_of_another_version"
    elif word == "prepare":
        mkl_kernels.prepare()
    elif word == "torch":
        import torch
    elif word == "product":
        torch.ones(2, 2) @ torch.ones(2, 2)
    else:
        problems.append(mkl_kernels.choose(word == "true"))
torch.manual_seed(0)
for n, k, m in ((768, 128, 512), (1, 128, 384), (37, 5, 3), (64, 64, 64), (1000, 300, 7)):
    a, b = torch.randn(n, k), torch.randn(k, m)
    for left, right in ((a, b), (b.t(), a.t()), (a, b.t().contiguous().t())):
        exact = left.double() @ right.double()
        bound = left.double().abs() @ right.double().abs()
        worst = max(worst, ((left @ right - exact).abs() / bound).max().item())
print(json.dumps([mkl_kernels.active(), worst, [problem for problem in problems if problem]]))
"""


@pytest.mark.parametrize(
    ("words", "active", "refused"),
    [
        ("prepare torch true", True, ""),
        ("prepare torch false", False, ""),
        ("prepare torch", False, ""),  # nobody has chosen
        *(
            pytest.param(*values, marks=pytest.mark.slow)
            for values in (
                ("torch prepare true", False, ""),  # too late
                ("absent prepare torch true", False, ""),
                ("unasked prepare torch true", False, ""),
                ("prepare torch product true", False, ""),  # MKL has asked already
                ("prepare torch true product true", True, ""),
                ("prepare torch false product false", False, ""),
                ("prepare torch false true product", True, ""),  # MKL has not asked yet
                ("prepare torch true product false", True, "false"),
                ("prepare torch false product true false", False, "true"),
            )
        ),
    ],
)
def test_products_are_right_and_a_choice_stands_from_the_first_on(words: str, active: bool, refused: str) -> None:
    command = [sys.executable, "-c", PROGRAM, *words.split()]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    is_active, worst, problems = json.loads(done.stdout)
    assert is_active == (NEEDED and active)
    assert worst < 2**-23 * 8  # of the sum of the absolute products; a product of 1,000 terms has some roundings
    assert len(problems) == (NEEDED and bool(refused))
    assert all(problem.startswith(f"hardware.fast_mkl={refused}: an earlier run") for problem in problems)


@pytest.mark.slow
@needed
def test_one_process_cannot_have_both(corpus: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    process = spawn("-m", *TINY, f"data.path={corpus}", "hardware.fast_mkl=true,false", f"hydra.sweep.dir={sweep}",
                    cwd=tmp_path)  # fmt: skip
    code, out, _ = finish(process)
    assert code == 1
    assert "hardware.fast_mkl=false: an earlier run of this process had it otherwise" in out
    known = [Run.open(path.parent).info for path in sweep.glob("*/run.json")]
    assert [info["device"]["fast_mkl"] for info in known if info["status"] == "done"] == [True]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_run_tells_which_kernels_it_had_and_repeats_with_them(corpus: Path, tmp_path: Path) -> None:
    rows = {}
    for name, setting in (("fast", "true"), ("own", "false"), ("again", "true")):
        options = [f"data.path={corpus}", f"hardware.fast_mkl={setting}", f"hydra.run.dir={name}"]
        assert finish(spawn(*TINY, *options, cwd=tmp_path))[0] == 0
        run = Run.open(tmp_path / name)
        assert run.info["device"]["fast_mkl"] == (NEEDED and setting == "true")
        rows[name] = timeless(run)
    assert rows["fast"] == rows["again"]
    losses = METRICS.index("val/loss")
    for fast, own in zip(rows["fast"][1:], rows["own"][1:], strict=True):
        assert fast[losses] == own[losses] == "" or float(fast[losses]) == pytest.approx(float(own[losses]), rel=1e-4)
