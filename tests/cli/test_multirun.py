"""Sweeps with Hydra's own launcher, and the W&B runs that they leave, read back from their files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gptexp.records import read_metrics, read_samples
from gptexp.runs import Run
from tests.cli.wandb_file import read_run
from tests.conftest import TINY, failing


@pytest.fixture
def sweep(command: Callable[..., int], corpus: Path, tmp_path: Path) -> Callable[..., tuple[int, dict[str, Run]]]:
    def run(*overrides: str) -> tuple[int, dict[str, Run]]:
        code = command("-m", *TINY, f"data.path={corpus}", f"output_dir={tmp_path / 'out'}", *overrides)
        (folder,) = (tmp_path / "out" / "sweeps").iterdir()
        return code, {p.name: Run.open(p) for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")}

    return run


@pytest.mark.slow
def test_every_job_has_a_readable_directory(sweep: Callable[..., tuple[int, dict[str, Run]]]) -> None:
    code, runs = sweep("model.norm=layernorm,rmsnorm", "placement=pre,post", "seed=1,2")
    assert code == 0
    assert sorted(runs) == [
        f"{n}-{p}-h2-s{s}" for n in ("layernorm", "rmsnorm") for p in ("post", "pre") for s in (1, 2)
    ]
    for name, run in runs.items():
        config = run.config
        assert config.variant == name
        assert run.info["status"] == "done"
    assert len({run.info["fingerprints"]["config"] for run in runs.values()}) == 8
    assert (run.path.parent / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_hydras_own_setting_of_the_mode(command: Callable[..., int], corpus: Path, tmp_path: Path) -> None:
    settings = [*TINY, f"data.path={corpus}", f"output_dir={tmp_path}", "hydra.mode=MULTIRUN", "max_steps=1"]
    assert command(*settings) == 0
    assert len(list((tmp_path / "sweeps").glob("*/*/run.json"))) == 1


def test_other_settings_stand_in_the_name(
    sweep: Callable[..., tuple[int, dict[str, Run]]], command: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    _, runs = sweep("optimizer.learning_rate=1e-3,1e-2", "max_steps=1")
    assert sorted(runs) == ["layernorm-pre-h2-s1337-learning_rate_0.001", "layernorm-pre-h2-s1337-learning_rate_0.01"]
    code = command(f"resume={runs['layernorm-pre-h2-s1337-learning_rate_0.01'].path}")
    assert code == 2  # it is done; but its name can be given as it stands
    assert "this run is done" in capfd.readouterr().err


def test_a_failed_job_does_not_stop_the_others(
    sweep: Callable[..., tuple[int, dict[str, Run]]], capfd: pytest.CaptureFixture[str]
) -> None:
    code, runs = sweep("model.n_embd=15,16", "seed=1,2", "max_steps=2")
    assert code == 1
    assert sorted(runs) == ["layernorm-pre-h2-s1-n_embd_16", "layernorm-pre-h2-s2-n_embd_16"]
    out, err = capfd.readouterr()
    assert err == "error: 2 of 4 jobs failed\n"
    assert "model.n_head=2: must divide model.n_embd=15" in out


def test_a_sweep_over_lists_and_globs(sweep: Callable[..., tuple[int, dict[str, Run]]]) -> None:
    code, runs = sweep("norm=batchnorm", "model.norms.batchnorm.stats=[batch],[batch,time]", "max_steps=1")
    assert code == 0
    assert sorted(runs) == ["batchnorm-pre-h2-s1337-stats__batch_", "batchnorm-pre-h2-s1337-stats__batch_time_"]


def test_a_glob_takes_every_choice(sweep: Callable[..., tuple[int, dict[str, Run]]]) -> None:
    code, runs = sweep("norm=glob(*batchnorm)", "max_steps=1")
    assert code == 0
    assert sorted(runs) == [f"{norm}-pre-h2-s1337" for norm in ("batchnorm", "causal_batchnorm")]


def test_a_sweep_needs_no_resume(command: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> None:
    assert command("-m", "resume=auto", "seed=1,2") == 2
    told = "error: resume=auto: a sweep goes on when its command is given again; leave it out\n"
    assert capfd.readouterr().err == told


@pytest.mark.slow
def test_each_job_is_a_wandb_run_of_its_own(sweep: Callable[..., tuple[int, dict[str, Run]]]) -> None:
    _, runs = sweep("logger=wandb", "logger.wandb.tags=[mine]", "norm=layernorm,rmsnorm", "seed=1,2")
    assert len(runs) == 4
    identities = set()
    for name, run in runs.items():
        (file,) = run.path.glob("wandb/offline-run-*/run-*.wandb")
        record = read_run(file)
        identities.add(record.id)
        assert record.id == run.info["loggers"]["wandb"]
        assert record.name == name
        assert record.group == run.path.parent.name
        assert record.project == "gptexp"
        assert record.job_type == "train"
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
            assert {k: row[k] for k in ("train/loss", "tokens")} == {
                k: rows[row["trainer/global_step"]][k] for k in ("train/loss", "tokens")}
        assert record.metrics["val/loss"] == ("trainer/global_step", True)  # x-axis, and the minimum in the summary
        assert record.exit_code == 0
        tables = [row["samples/path"] for row in record.history if "samples/path" in row]
        table = json.loads((file.parent / "files" / tables[-1]).read_text())
        assert table["columns"] == ["step", "text"]
        assert [tuple(row) for row in table["data"]] == read_samples(run.samples_path)
    assert len(identities) == 4


def test_a_failed_run_is_closed_in_wandb(command: Callable[..., int], corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with failing():
        assert command(*TINY, "logger=wandb", f"data.path={corpus}", f"hydra.run.dir={folder}") == 1
    run = Run.open(folder)
    assert run.info["status"] == "failed"
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    assert read_run(file).exit_code == 1


def test_a_resumed_run_goes_on_in_the_same_wandb_run(
    command: Callable[..., int], corpus: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with failing(15):
        assert command(*TINY, "logger=wandb", f"data.path={corpus}", f"hydra.run.dir={folder}") == 1
    assert command(f"resume={folder}") == 0
    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda p: p.stat().st_mtime)
    records = [read_run(file) for file in files]
    assert len(records) == 2
    assert records[0].id == records[1].id == Run.open(folder).info["loggers"]["wandb"]
    assert records[0].name == records[1].name
    assert max(row["trainer/global_step"] for row in records[1].history) == 24
    tables = [row["samples/nrows"] for row in records[1].history if "samples/nrows" in row]
    assert tables[-1] == 4  # those from before the interruption, too
