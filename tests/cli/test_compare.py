"""The command that compares: real runs, what it prints and leaves, and mistakes."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from gptexp import compare
from gptexp.records import read_metrics
from gptexp.runs import Run
from tests.cli.wandb_file import read_run
from tests.conftest import REPOSITORY, TINY, finish, spawn

Command = Callable[..., int]

WANDB = {"wandb": {"_target_": "gptexp.loggers.wandb.WandbLogger", "project": "mine", "mode": "offline"}}


@pytest.fixture
def sweep(command: Command, corpus: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "norms"
    assert command("-m", *TINY, f"data.path={corpus}", f"hydra.sweep.dir={folder}", "norm=layernorm,batchnorm",
                   "placement=pre,post", "seed=1,2,3", "max_steps=8", "schedule.warmup_steps=1") == 0  # fmt: skip
    return folder


def test_a_sweep_of_real_runs(sweep: Path, command: Command, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    assert command(str(sweep), main=compare.main) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert "Undecided: 3 seeds cannot decide 5 comparisons at 5\u00a0%" in out
    assert "placement: post against pre" in out
    assert "12 runs: 12 done." in out
    assert out.endswith(f"report: {sweep / 'report' / 'report.html'}\n")
    page = (sweep / "report" / "report.html").read_text()
    assert "The training loss of batchnorm pre, batchnorm post sees later tokens" in page
    assert "seed=4,5" in page
    assert "-m data=file logger=none" in page
    table = pd.read_csv(sweep / "report" / "tables" / "runs.csv").set_index("name")
    for path in (p.parent for p in sweep.glob("*/run.json")):
        losses = [row["val/loss"] for row in read_metrics(path / "metrics.csv") if "val/loss" in row]
        assert table.loc[path.name, "best"] == pytest.approx(min(losses), abs=0)
        assert table.loc[path.name, "config"] == Run.open(path).config.fingerprint()
    # Again, with a report in the folder already; on the runs by themselves; with a baseline and a place of one's own.
    runs = sorted(str(p.parent) for p in sweep.glob("*/run.json"))
    settings = ["baseline=batchnorm pre", f"output={sweep.parent / 'mine'}", "metric=final", "target=3.5", "delta=0.1"]
    assert command(*runs, *settings, main=compare.main) == 0
    assert "differences are from batchnorm pre" in capfd.readouterr().out
    assert (sweep.parent / "mine" / "report.html").exists()


def test_an_unfinished_sweep(
    write: Callable[..., Run], command: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sweep = tmp_path / "sweep"
    runs = sorted(write(3.0, seed, norm, placement).path for norm in ("layernorm", "batchnorm")
                  for placement in ("pre", "post") for seed in (1, 2, 3))  # fmt: skip
    (sweep / "sweep.json").write_text(json.dumps({"jobs": [p.name for p in runs]}))
    shutil.rmtree(runs[0])
    Run(runs[1]).update(status="running")
    (runs[2] / "result.json").write_text('{"status"')
    (runs[3] / "run.json").write_text("")
    with (runs[4] / "metrics.csv").open("a") as file:
        file.write("9,")
    assert command(str(sweep), main=compare.main) == 0
    out = capfd.readouterr().out
    assert "12 runs: 8 done, 1 still running, 1 without a directory, 2 unreadable." in out
    assert f"unreadable: {runs[3]} (run.json is not valid JSON)" in out
    page = (sweep / "report" / "report.html").read_text()
    assert runs[3].name in page


def test_mistakes_are_told_together(command: Command, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert command(str(tmp_path / "nowhere"), "dleta=0.1", "metric=worst", "alpha=2", "alpha=3", main=compare.main) == 2
    assert capfd.readouterr().err.splitlines() == [
        f"error: {tmp_path / 'nowhere'}: there is no such directory",
        "error: alpha=3: alpha is set twice",
        "error: dleta=0.1: unknown key; did you mean delta?",
        "error: metric=worst: must be one of best, final",
        "error: alpha=2: must be a number greater than 0 and less than 1",
    ]
    assert command(main=compare.main) == 2
    assert "no directory is given" in capfd.readouterr().err
    assert command(str(tmp_path), main=compare.main) == 2
    assert capfd.readouterr().err == f"error: {tmp_path}: holds no runs\n"


def test_a_folder_that_cannot_be_written(
    write: Callable[..., Run], tmp_path: Path, command: Command, capfd: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    write(2.0, 1)
    (tmp_path / "file").write_text("")
    assert command(str(tmp_path / "sweep"), f"output={tmp_path / 'file'}", main=compare.main) == 2
    assert f"error: output={tmp_path / 'file'}: cannot be written" in capfd.readouterr().err


@pytest.mark.parametrize("seeds", [0, 1, 2])
def test_too_little_to_compare(
    seeds: int, write: Callable[..., Run], tmp_path: Path, command: Command, capfd: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    write([], 7, status="running")
    for seed in range(seeds):
        write(2.0, seed)
        write(2.1, seed + (seeds == 2), "rmsnorm")
    assert command(str(tmp_path / "sweep"), main=compare.main) == 0
    out = capfd.readouterr().out
    assert {0: "No run has come to its end", 1: "1 seed cannot decide", 2: "1 seed cannot decide"}[seeds] in out


def test_help_and_the_real_process() -> None:
    code, out, _ = finish(spawn("--help", cwd=REPOSITORY, module="gptexp.compare"))
    assert code == 0
    assert "baseline=LABEL" in out
    code, _, err = finish(spawn("nowhere", "alpha=x", cwd=REPOSITORY, module="gptexp.compare"))
    assert code == 2
    assert err.splitlines() == [
        "error: nowhere: there is no such directory", "error: alpha=x: must be a number greater than 0 and less than 1",
    ]  # fmt: skip


def test_a_level_in_brackets_is_shown(
    write: Callable[..., Run], tmp_path: Path, command: Command, capfd: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    for stats in (["batch"], ["batch", "time"]):
        write(2.0, 1, "batchnorm", model={"norms": {"batchnorm": {"stats": stats}}}, name=f"n{len(stats)}")
    assert command(str(tmp_path / "sweep"), main=compare.main) == 0
    assert 'stats=["batch", "time"]' in capfd.readouterr().out


def test_a_report_in_wandb(
    write: Callable[..., Run], tmp_path: Path, command: Command, capfd: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    for seed in range(6):
        write(2.0 + seed / 100, seed, settings={"logger": WANDB})
        write(1.9 + seed / 100, seed, "rmsnorm")
    folder = tmp_path / "sweep"
    assert command(str(folder), main=compare.main) == 0
    assert not (folder / "report" / "wandb").exists()  # off by default
    assert command(str(folder), "logger=wandb", main=compare.main) == 0
    (file,) = folder.glob("report/wandb/offline-run-*/run-*.wandb")
    assert f"upload it later with: wandb sync {file.parent}" in capfd.readouterr().out
    record = read_run(file)
    assert (record.name, record.group, record.job_type) == ("sweep comparison", "sweep", "compare")
    assert record.project == "mine"  # that of the runs
    assert record.exit_code == 0
    assert json.loads(record.summary["best_variant"]) == "rmsnorm"
    assert json.loads(record.summary["runs"]) == 12
    assert "rmsnorm is better than layernorm" in json.loads(record.summary["headline"])
    report = folder / "report"
    files = sorted(str(p.relative_to(report)) for p in report.rglob("*") if p.is_file() and "wandb" not in p.parts)
    assert record.artifacts["report:sweep-report"] == files
    assert {"report.html", "tables/variants.csv", "figures/forest.png"} <= set(files)
    (row,) = [row for row in record.history if "report/path" in row]
    assert (file.parent / "files" / row["report/path"]).read_text() == (report / "report.html").read_text()
    assert {f"figures/{p.stem}/path" for p in report.glob("figures/*.png")} <= row.keys()
    for name in ("variants", "comparisons"):
        table = json.loads((file.parent / "files" / row[f"{name}/path"]).read_text())
        stored = pd.read_csv(report / "tables" / f"{name}.csv")
        assert table["columns"] == list(stored)
        assert len(table["data"]) == len(stored)
        assert table["data"][0][0] == stored.iloc[0, 0]


def test_an_empty_report_in_wandb(write: Callable[..., Run], tmp_path: Path, command: Command) -> None:
    write([], 7, status="running")
    assert command(str(tmp_path / "sweep"), "logger=wandb", main=compare.main) == 0
    (file,) = tmp_path.glob("sweep/report/wandb/offline-run-*/run-*.wandb")
    assert "No run has come to its end" in json.loads(read_run(file).summary["headline"])
    assert command(str(tmp_path / "sweep"), "logger=wandbb", main=compare.main) == 2


@pytest.mark.parametrize("named", ["twice", "link", "runs", "run and sweep"])
def test_what_is_named_twice_or_in_part_counts_once(
    named: str, write: Callable[..., Run], command: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runs = [write(2.0 + seed / 10, seed=seed, norm=norm) for norm in ("layernorm", "rmsnorm") for seed in (1, 2)]
    sweep = runs[0].path.parent
    (sweep / "sweep.json").write_text(json.dumps({"jobs": [run.path.name for run in runs], "settings": {}}))
    (tmp_path / "link").symlink_to(sweep)
    folders = {
        "twice": [sweep, sweep], "link": [tmp_path / "link", sweep], "runs": [runs[0].path, runs[2].path],
        "run and sweep": [runs[0].path, sweep],
    }[named]  # fmt: skip
    assert command(*map(str, folders), f"output={tmp_path / 'report'}", main=compare.main) == 0
    count = 2 if named == "runs" else 4
    assert f"{count} runs: {count} done." in capfd.readouterr().out


def test_a_sweep_that_has_just_begun(
    write: Callable[..., Run], command: Command, capfd: pytest.CaptureFixture[str]
) -> None:
    run = write(2.0)
    sweep = run.path.parent
    (sweep / "sweep.json").write_text(json.dumps({"jobs": [run.path.name], "settings": {}}))
    (run.path / "run.json").write_text("")
    assert command(str(sweep), main=compare.main) == 2
    assert capfd.readouterr().err == f"error: {run.path}: run.json is not valid JSON\n"
    shutil.rmtree(run.path)
    assert command(str(sweep), main=compare.main) == 2
    assert capfd.readouterr().err == f"error: {sweep}: none of the 1 jobs has begun\n"


@pytest.mark.slow
def test_a_terminal_without_unicode(write: Callable[..., Run], tmp_path: Path) -> None:
    runs = [write(2.0 + seed / 10, seed=seed, settings={"name": "中"}) for seed in (1, 2)]
    env = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    process = spawn(str(runs[0].path.parent), cwd=tmp_path, module="gptexp.compare", env=env)
    code, out, err = finish(process)
    assert (code, err) == (0, "")
    assert "2 runs: 2 done." in out


def test_a_run_that_is_done_but_has_no_losses_is_told(
    write: Callable[..., Run], command: Command, capfd: pytest.CaptureFixture[str]
) -> None:
    runs = [write(2.0 + seed / 10, seed=seed) for seed in (1, 2)]
    runs[1].metrics_path.write_text("")
    assert command(str(runs[0].path.parent), main=compare.main) == 0
    assert f"unreadable: {runs[1].path} (metrics.csv holds no losses)" in " ".join(capfd.readouterr().out.split())
