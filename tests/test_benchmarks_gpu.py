"""The script that measures what needs a GPU, in miniature on the CPU."""

import json
import math
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from benchmarks import gpu_parts
from benchmarks.gpu import attempt
from benchmarks.gpu_parts import FIGURES, PARTS, Stage, as_far_as_it_comes, check_close, differences, killed_and_resumed
from gptexp.config.command_line import compose_config
from gptexp.runs.files import last_row
from gptexp.runs.run import Run
from tests.conftest import REPOSITORY
from tests.test_benchmarks import numbers

PEER_TRAIN = """
import sys
settings = dict(argument[2:].split("=") for argument in sys.argv[1:] if argument.startswith("--"))
for i in range(int(settings["max_iters"]) + 1):
    print(f"iter {i}: loss 4.1713, time 40.00ms, mfu -100.00%", flush=True)
"""
PEER_SAMPLE = "import sys; assert '--device=cpu' in sys.argv, sys.argv"


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    """A checkout that prints what nanoGPT would."""
    data = tmp_path / "peer" / "data" / "shakespeare_char"
    data.mkdir(parents=True)
    (data / "prepare.py").touch()
    (tmp_path / "peer" / "train.py").write_text(PEER_TRAIN)
    (tmp_path / "peer" / "sample.py").write_text(PEER_SAMPLE)
    return tmp_path / "peer"


def stage(folder: Path, gpu: bool = False) -> Stage:
    return Stage(gpu, folder, math.inf)


def test_all_parts_together_stay_under_nine_minutes() -> None:
    assert sum(part.seconds for part in PARTS.values()) < 9 * 60


@pytest.mark.slow
def test_a_part_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    figures = tmp_path / "new" / "figures.json"
    done = run("--only=ladder,throughput,generate", f"--peer={tmp_path}", f"--json={figures}", "--minutes=60")
    assert done.returncode == 1, done.stderr
    assert "no train.py" in done.stdout
    assert "┏" in done.stdout
    report = json.loads(figures.read_text())
    assert {name: part["status"] for name, part in report["parts"].items()} == {
        "machine": "passed", "throughput": "failed", "generate": "failed", "ladder": "passed",
    }  # fmt: skip
    assert "no train.py" in report["parts"]["throughput"]["error"][-1]
    assert report["parts"]["machine"]["figures"]["gpu"] is False
    ladder = report["parts"]["ladder"]["figures"]
    assert (ladder["status"], ladder["steps"], ladder["reached"]) == ("done", 40, None)
    losses = [row["val/loss"] for row in ladder["evaluations"]]
    assert len(losses) == 5
    assert ladder["best"]["val/loss"] == min(losses) < losses[0]


def test_parts_beside_a_peer_are_skipped_without_one(tmp_path: Path) -> None:
    done = run("--only=throughput", f"--json={tmp_path / 'figures.json'}")
    assert done.returncode == 0, done.stderr
    parts = json.loads((tmp_path / "figures.json").read_text())["parts"]
    assert list(parts) == ["machine", "throughput"]
    assert parts["throughput"] == {"status": "skipped", "figures": {"shown": "needs --peer"}}
    assert "needs --peer" in done.stdout


def test_a_part_that_is_not_there_is_refused() -> None:
    done = run("--only=ladder,laddr")
    assert done.returncode == 2
    assert "--only: laddr: no such part; allowed: machine, resume, " in done.stderr


def test_a_part_that_hangs_is_killed_with_all_its_processes_and_keeps_its_figures(tmp_path: Path) -> None:
    """The process below it is in a session of its own, as those of torch's launcher are."""
    script = f"""printf '{{"shown": "half"}}' > {tmp_path / FIGURES}
                 setsid sleep 600 & echo $! > {tmp_path / "pid"}; echo on the way; wait"""
    done = attempt(["sh", "-c", script], tmp_path, 2.0)
    assert done["seconds"] < 60
    found = done["status"], done["figures"], done["error"]
    assert found == ("out of time", {"shown": "half"}, ["on the way"])
    stat = Path("/proc", (tmp_path / "pid").read_text().strip(), "stat")
    deadline = time.monotonic() + 60
    while stat.exists() and ") Z " not in stat.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_part_that_fails_keeps_its_figures_and_last_lines(tmp_path: Path) -> None:
    script = f"""printf '{{"loss": 2.5}}' > {tmp_path / FIGURES}; seq 100; exit 3"""
    done = attempt(["sh", "-c", script], tmp_path, 60)
    found = done["status"], done["figures"], done["error"]
    assert found == ("failed", {"loss": 2.5}, [str(n) for n in range(41, 101)])


def leave(folder: Path, *losses: str) -> Path:
    """What a run leaves of its metrics: a row with a validation loss every 400 steps, and times that vary."""
    folder.mkdir(exist_ok=True)
    rows = [f"{400 * n},{loss},{time.monotonic()}\n" for n, loss in enumerate(losses)]
    (folder / "metrics.csv").write_text("step,val/loss,seconds\n" + "".join(rows))
    return folder


def test_differences_of_two_runs_are_found(tmp_path: Path) -> None:
    run = leave(tmp_path / "run", "4.0", "2.0")
    assert differences(run, leave(tmp_path / "again", "4.0", "2.0")) == []
    other = leave(tmp_path / "other", "4.5", "2.01")
    assert differences(run, other) == ["step 0: val/loss 4.0 against 4.5", "step 400: val/loss 2.0 against 2.01"]
    assert differences(run, leave(tmp_path / "short", "4.0")) == ["2 rows against 1"]


@pytest.mark.parametrize(("resumed", "problem"), [
    ("2.0000001", "exact: resumed, it differs: step 400: val/loss 2.0000001 against 2.0"),
    ("2.0", None),
])  # fmt: skip
def test_a_run_that_resumes_to_other_bits_fails(
    resumed: str, problem: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With commands that only leave what a run would."""

    def train(where: str, *_: str) -> float:
        key, _, folder = where.partition("=")
        leave(Path(folder), "4.0", resumed if key == "resume" else "2.0")
        return 1.0

    def killed_after(step: int, folder: Path, *_: str) -> int:
        leave(folder, "4.0", "3.0")
        return step

    monkeypatch.setattr(gpu_parts, "train", train)
    monkeypatch.setattr(gpu_parts, "killed_after", killed_after)
    figures: dict[str, object] = {}
    with pytest.raises(SystemExit, match=problem) if problem else nullcontext():
        for more in killed_and_resumed(stage(tmp_path), {"exact": []}):
            figures |= more
    assert figures["exact"] == {
        "first_val_loss": 4.0, "val_loss": 2.0, "killed_after": 60,
        "differences": [problem.partition("differs: ")[2]] if problem else [],
    }  # fmt: skip


def test_losses_that_are_too_far_apart_are_told() -> None:
    check_close({"plain": 2.0, "compiled": 2.019}, "plain", 0.02)
    with pytest.raises(SystemExit, match=r"compiled: val/loss 2\.0210, but 2\.0000 with plain"):
        check_close({"plain": 2.0, "compiled": 2.021}, "plain", 0.02)
    with pytest.raises(SystemExit, match="compiled: val/loss nan"):
        check_close({"plain": 2.0, "compiled": math.nan}, "plain", 0.02)


@pytest.mark.slow
def test_a_run_that_is_out_of_time_saves_and_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class UntilTarget(Stage):
        def left(self) -> float:
            return 0.0 if last_row(self.folder / "run" / "metrics.csv").get("val/loss", 9) <= 4.0 else 100.0

    monkeypatch.setattr(gpu_parts, "FEW", 10**6)
    settings = ["experiment=nanogpt_gpu", "schedule=constant", "optimizer.learning_rate=0.01"]
    (figures,) = as_far_as_it_comes(UntilTarget(False, tmp_path, math.inf), 4.0, *settings)
    assert figures["status"] == "interrupted"
    assert 0 < figures["reached"]["step"] <= figures["steps"]
    assert figures["best"]["val/loss"] <= figures["reached"]["val/loss"] <= 4.0
    assert figures["shown"].startswith(f"{figures['steps']} steps, interrupted; best val/loss ")
    assert Run.open(tmp_path / "run").checkpoint("last").exists()


@pytest.mark.parametrize("own", [
    ["experiment=nanogpt_gpu", "hardware.compile=graphs"],
    ["hardware=ddp", "hardware.devices=1", "experiment=nanogpt_gpu"],
    ["hardware=fsdp", "hardware.devices=1", "experiment=nanogpt_gpu", "hardware.precision=bf16-mixed"],
    ["experiment=fast_gpu"],
    ["experiment/ladder=7_scaled"],
])  # fmt: skip
def test_what_a_gpu_is_asked_for_is_a_configuration(own: list[str], tmp_path: Path) -> None:
    """All that a CPU cannot run of it."""
    gpu = stage(tmp_path, gpu=True)
    config = compose_config(gpu.settings(*own))
    assert config.hardware.accelerator == "gpu"
    assert config.batch_size * config.model.block_size == gpu.tokens


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(1800)  # the compiler alone takes a minute
def test_all_parts_run_in_miniature(peer: Path, tmp_path: Path) -> None:
    done = run(f"--peer={peer}", f"--json={tmp_path / 'figures.json'}", "--minutes=60")
    report = json.loads((tmp_path / "figures.json").read_text())
    assert {name: part["status"] for name, part in report["parts"].items()} == dict.fromkeys(PARTS, "passed"), report
    assert done.returncode == 0, done.stderr
    figures = {name: part["figures"] for name, part in report["parts"].items()}
    assert all(figures[name]["shown"] for name in PARTS)
    assert all(math.isfinite(n) for n in numbers(figures))
    for name in ("bf16-mixed", "32-true"):
        assert figures["resume"][name]["differences"] == []
        assert 60 <= figures["resume"][name]["killed_after"] < 400
    assert figures["compile"]["graphs"] == figures["strategies"]["fsdp"] == "not on a CPU"
    alone, ddp = (figures["strategies"][name]["val_loss"] for name in ("auto", "ddp"))
    assert ddp == pytest.approx(alone, abs=1e-4)
    assert set(figures["throughput"]["rounds"][0]) == {"gptexp", "nanoGPT"}
    assert set(figures["overhead"]["rounds"][0]) == {"command", "bare loop"}
    assert set(figures["generate"]) == {"loading_seconds", "samples=1", "samples=2", "shown"}
