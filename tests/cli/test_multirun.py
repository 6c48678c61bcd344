"""Sweeps with Hydra's own launcher, and the W&B runs that they leave, read back from their files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gptexp.runs.files import read_metrics, read_samples
from gptexp.runs.run import Run
from tests.cli.wandb_file import read_run
from tests.conftest import TINY, failing, runs_of

Sweep = Callable[..., tuple[int, dict[str, Run]]]


@pytest.fixture
def sweep(command: Callable[..., int], corpus: Path, tmp_path: Path) -> Sweep:
    """Starts a sweep; returns the exit status, and the runs by their names."""

    def run(*overrides: str) -> tuple[int, dict[str, Run]]:
        code = command("-m", *TINY, f"data.path={corpus}", f"output_dir={tmp_path / 'out'}", *overrides)
        (folder,) = (tmp_path / "out" / "sweeps").iterdir()
        return code, runs_of(folder)

    return run


@pytest.mark.parametrize(("overrides", "names"), [
    ("model.norm=layernorm,rmsnorm placement=pre,post",
     [f"{norm}-{placement}-h2-s1337" for norm in ("layernorm", "rmsnorm") for placement in ("post", "pre")]),
    ("optimizer.learning_rate=1e-3,1e-2", [f"layernorm-pre-h2-s1337-learning_rate_{rate}" for rate in (0.001, 0.01)]),
    ("norm=batchnorm model.norms.batchnorm.stats=[batch],[batch,time]",
     ["batchnorm-pre-h2-s1337-stats__batch_", "batchnorm-pre-h2-s1337-stats__batch_time_"]),
    ("norm=glob(*batchnorm)", [f"{norm}-pre-h2-s1337" for norm in ("batchnorm", "causal_batchnorm")]),
    ("hydra.mode=MULTIRUN", ["layernorm-pre-h2-s1337"]),
])  # fmt: skip
def test_every_job_has_a_readable_directory(overrides: str, names: list[str], sweep: Sweep) -> None:
    code, runs = sweep(*overrides.split(), "max_steps=1")
    assert code == 0
    assert list(runs) == names
    for name, run in runs.items():
        assert name.startswith(run.config.variant)
        assert run.info["status"] == "done"
        assert (run.path.parent / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len({run.info["fingerprints"]["config"] for run in runs.values()}) == len(names)


def test_a_failed_job_does_not_stop_the_others(sweep: Sweep, capfd: pytest.CaptureFixture[str]) -> None:
    code, runs = sweep("model.n_embd=15,16", "seed=1,2", "max_steps=2")
    assert code == 1
    assert list(runs) == ["layernorm-pre-h2-s1-n_embd_16", "layernorm-pre-h2-s2-n_embd_16"]
    out, err = capfd.readouterr()
    assert err == "error: 2 of 4 jobs failed\n"
    assert "model.n_head=2: must divide model.n_embd=15" in out


def test_a_sweep_needs_no_resume(command: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> None:
    assert command("-m", "resume=auto", "seed=1,2") == 2
    told = "error: resume=auto: a sweep goes on when its command is given again; leave it out\n"
    assert capfd.readouterr().err == told


@pytest.mark.slow
def test_each_job_is_a_wandb_run_of_its_own(sweep: Sweep) -> None:
    _, runs = sweep("logger=wandb", "logger.wandb.tags=[mine]", "norm=layernorm,rmsnorm")
    identities = set()
    for name, run in runs.items():
        (file,) = run.path.glob("wandb/offline-run-*/run-*.wandb")
        record = read_run(file)
        identities.add(record.id)
        assert record.id == run.info["loggers"]["wandb"]
        assert (record.name, record.group, record.project) == (name, run.path.parent.name, "gptexp")
        assert (record.job_type, record.exit_code) == ("train", 0)
        assert set(record.tags) == {run.config.model.norm, "pre", "h2", "file", "mine"}
        settings = json.loads(json.dumps(run.config.essence()))  # all that can change a result
        settings["model"]["vocab_size"] = len(run.info["tokenizer"]["symbols"])
        assert {k: json.loads(v) for k, v in record.config.items() if k in settings} == settings
        rows = {row["step"]: row for row in read_metrics(run.metrics_path)}
        logged = {r["trainer/global_step"]: r["val/loss"] for r in record.history if "val/loss" in r}
        assert logged == {step: row["val/loss"] for step, row in rows.items() if "val/loss" in row}
        trained = [r for r in record.history if "train/loss" in r]
        assert len(trained) == 8
        for row in trained:
            written = rows[row["trainer/global_step"]]
            assert (row["train/loss"], row["tokens"]) == (written["train/loss"], written["tokens"])
        assert record.metrics["val/loss"] == ("trainer/global_step", True)  # x-axis, and the minimum in the summary
        tables = [row["samples/path"] for row in record.history if "samples/path" in row]
        table = json.loads((file.parent / "files" / tables[-1]).read_text())
        assert table["columns"] == ["step", "text"]
        assert [tuple(row) for row in table["data"]] == read_samples(run.samples_path)
    assert len(identities) == 2


def test_a_failed_and_resumed_run_is_one_wandb_run(
    command: Callable[..., int], corpus: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with failing(15):
        assert command(*TINY, "logger=wandb", f"data.path={corpus}", f"hydra.run.dir={folder}") == 1
    run = Run.open(folder)
    assert run.info["status"] == "failed"
    assert command(f"resume={folder}") == 0
    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda p: p.stat().st_mtime)
    first, second = (read_run(file) for file in files)
    assert (first.exit_code, second.exit_code) == (1, 0)
    assert first.id == second.id == run.info["loggers"]["wandb"]
    assert first.name == second.name
    assert max(row["trainer/global_step"] for row in second.history) == 24
    tables = [row["samples/nrows"] for row in second.history if "samples/nrows" in row]
    assert tables[-1] == 4  # those from before the interruption, too
