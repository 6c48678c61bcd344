"""What larger models would need: counts against published models, and against this project's own."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import memory, scaling
from benchmarks.forecast import SIZES, Size, forecast
from gptexp.models.gpt_settings import GPTConfig
from gptexp.models.settings import build_model
from tests.conftest import REPOSITORY


@pytest.mark.parametrize(("name", "published"), [("124 M", 124_439_808), ("1.5 B", 1_557_611_200)])
def test_parameters_of_the_published_models(name: str, published: int) -> None:
    assert SIZES[name].parameters == published


@pytest.mark.parametrize(("n_layer", "n_embd", "block_size", "vocab_size"), [(1, 8, 16, 5), (3, 24, 8, 65)])
def test_counts_are_those_of_the_model(n_layer: int, n_embd: int, block_size: int, vocab_size: int) -> None:
    size = Size(n_layer, n_embd, block_size, vocab_size)
    model = build_model(GPTConfig(n_layer=n_layer, n_embd=n_embd, n_head=2, block_size=block_size,
                                  vocab_size=vocab_size, bias=True, tie_weights=True))  # fmt: skip
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert size.operations == model.flops_per_token()


def test_a_day_of_a_gpu() -> None:
    """nanoGPT's README: 124 M on 8 A100 in about 4 days, 600,000 steps of 491,520 tokens: 30 % of their rate."""
    found = forecast(SIZES["124 M"], 100, {"state": 1, "activations": 1}, 0.3 * 312 / 989)
    days = 600_000 * 491_520 / found["tokens/s on an H100"] / 86400 / 8
    assert days == pytest.approx(4, rel=0.1)


def test_a_fit_finds_what_the_rows_were_made_of() -> None:
    points = scaling.points()
    times = [{"gigaflop": scaling.operations(p), "milliseconds": 2 + 0.5 * p["model.n_layer"]
              + 1000 * scaling.operations(p) / 150} | p for p in points]  # fmt: skip
    assert scaling.fit(times) == pytest.approx({"step_ms": 2, "layer_ms": 0.5, "gflops": 150, "largest_error": 0})
    counts = [dict(zip(("state", "activations"), memory.counted(p), strict=True)) for p in points]
    peaks = [c | {"MiB": 300 + 1.5 * c["state"] + 0.7 * c["activations"]} for c in counts]
    expected = {"process_MiB": 300, "state": 1.5, "activations": 0.7, "largest_error": 0}
    assert memory.fit(peaks) == pytest.approx(expected, abs=1e-9)


def test_its_table_has_the_figures_of_the_files(tmp_path: Path) -> None:
    (tmp_path / "scaling.json").write_text(json.dumps({"fit": {"gflops": 123.0}}))
    (tmp_path / "memory.json").write_text(json.dumps({"fit": {"state": 1.0, "activations": 0.5}}))
    files = [f"--{name}={tmp_path / name}.json" for name in ("scaling", "memory")]
    command = [sys.executable, "-m", "benchmarks.forecast", *files]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "this machine at 123 GFLOP/s" in done.stdout
    assert "│ 124,439,808 " in done.stdout
    assert f"│ {16 * 1_557_611_200 / 2**30:.2g} " in done.stdout
    command[-1] = f"--memory={tmp_path}/none.json"
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"--memory {tmp_path}/none.json: no such file; python -m benchmarks.memory writes it\n"


def test_the_page_draws_its_figure(tmp_path: Path) -> None:
    fits = {"step_ms": 1.0, "layer_ms": 2.0, "gflops": 100.0}, {"process_MiB": 300.0, "state": 1.0, "activations": 1.0}
    rows = [p | {"gigaflop": scaling.operations(p), "milliseconds": 9.0, "state": 2.0, "activations": 3.0, "MiB": 310.0}
            for p in scaling.points()]  # fmt: skip
    files = [tmp_path / "scaling.json", tmp_path / "memory.json"]
    for file, fit in zip(files, fits, strict=True):
        file.write_text(json.dumps({"points": rows, "fit": fit}))
    script = shutil.copy(REPOSITORY / "docs" / "known_results.py", tmp_path)
    done = subprocess.run([sys.executable, script, "scale", *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    header, _, first, *_ = done.stdout.splitlines()
    assert header in (REPOSITORY / "docs" / "scale.md").read_text()
    taken = 1 + 2 * 4 + 1000 * scaling.operations(scaling.BASE) / 100
    assert first == f"| none | {scaling.operations(scaling.BASE):.2f} | 9.0 | {taken:.1f} | " + (
        f"{1000 * scaling.operations(scaling.BASE) / 9:.0f} | 310 | 305 |")  # fmt: skip
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"scale-light.svg", "scale-dark.svg"}
