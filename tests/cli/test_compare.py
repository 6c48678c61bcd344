"""The command that compares: real runs, what it prints and leaves, and mistakes."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from gptexp import compare
from gptexp.runs.files import read_metrics
from gptexp.runs.run import Run
from tests.cli.wandb_file import read_run
from tests.conftest import REPOSITORY, TINY, finish, spawn

Command = Callable[..., int]
Write = Callable[..., Run]
Compared = Callable[..., str]

WANDB = {"wandb": {"_target_": "gptexp.loggers.wandb.WandbLogger", "project": "mine", "mode": "offline"}}


@pytest.fixture
def compared(command: Command, capfd: pytest.CaptureFixture[str]) -> Compared:
    """Compares what is named; gives what is printed, or the mistakes if there should be some."""

    def run(*arguments: object, code: int = 0) -> str:
        capfd.readouterr()
        assert command(*map(str, arguments), main=compare.main) == code
        out, err = capfd.readouterr()
        assert bool(err) == bool(code)
        return err or out

    return run


def test_a_sweep_of_real_runs(command: Command, compared: Compared, corpus: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "norms"
    assert command("-m", *TINY, f"data.path={corpus}", f"hydra.sweep.dir={sweep}", "norm=layernorm,batchnorm",
                   "placement=pre,post", "seed=1", "max_steps=8", "schedule.warmup_steps=1") == 0  # fmt: skip
    out = compared(sweep)
    assert "but one seed decides nothing." in out
    assert "placement: post against pre" in out
    assert "4 runs: 4 done." in out
    assert out.endswith(f"report: {sweep / 'report' / 'report.html'}\n")
    page = (sweep / "report" / "report.html").read_text()
    assert "The training loss of batchnorm pre, batchnorm post sees later tokens" in page
    assert "-m data=file logger=none" in page
    table = pd.read_csv(sweep / "report" / "tables" / "runs.csv").set_index("name")
    for path in (p.parent for p in sweep.glob("*/run.json")):
        losses = [row["val/loss"] for row in read_metrics(path / "metrics.csv") if "val/loss" in row]
        assert table.loc[path.name, "best"] == pytest.approx(min(losses), abs=0)
        assert table.loc[path.name, "config"] == Run.open(path).config.fingerprint()
    # Again, with a report in the folder already; the runs by themselves; another baseline and place.
    runs = sorted(p.parent for p in sweep.glob("*/run.json"))
    mine = tmp_path / "mine"
    out = compared(*runs, "baseline=batchnorm pre", f"output={mine}", "metric=final", "target=3.5", "delta=0.1")
    assert "differences are from batchnorm pre" in out
    assert (mine / "report.html").exists()


def test_an_unfinished_sweep(write: Write, compared: Compared, tmp_path: Path) -> None:
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
    out = compared(sweep)
    assert "12 runs: 8 done, 1 still running, 1 without a directory, 2 unreadable." in out
    assert f"unreadable: {runs[3]} (run.json is not valid JSON)" in out
    assert runs[3].name in (sweep / "report" / "report.html").read_text()


def test_a_sweep_that_has_just_begun(write: Write, compared: Compared) -> None:
    run = write(2.0)
    sweep = run.path.parent
    (sweep / "sweep.json").write_text(json.dumps({"jobs": [run.path.name], "settings": {}}))
    (run.path / "run.json").write_text("")
    assert compared(sweep, code=2) == f"error: {run.path}: run.json is not valid JSON\n"
    shutil.rmtree(run.path)
    assert compared(sweep, code=2) == f"error: {sweep}: none of the 1 jobs has begun\n"


def test_mistakes_are_reported_together(write: Write, compared: Compared, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert compared(nowhere, "dleta=0.1", "metric=worst", "alpha=2", "alpha=3", code=2).splitlines() == [
        f"error: {nowhere}: there is no such directory",
        "error: alpha=3: alpha is set twice",
        "error: dleta=0.1: unknown key; did you mean delta?",
        "error: metric=worst: must be one of final, best, exact_match",
        "error: alpha=2: must be a number greater than 0 and less than 1",
    ]
    assert "no directory is given" in compared(code=2)
    assert compared(tmp_path, code=2) == f"error: {tmp_path}: holds no runs\n"
    assert "must be one of none, wandb" in compared(tmp_path, "logger=wandbb", code=2)
    write(2.0, 1)
    (file := tmp_path / "file").write_text("")
    assert f"error: output={file}: cannot be written" in compared(tmp_path / "sweep", f"output={file}", code=2)


@pytest.mark.parametrize("seeds", [0, 1, 2])
def test_too_little_to_compare(seeds: int, write: Write, compared: Compared, tmp_path: Path) -> None:
    write([], 7, status="running")
    for seed in range(seeds):
        write(2.0, seed)
        write(2.1, seed + (seeds == 2), "rmsnorm")
    assert ("decides nothing" if seeds else "No run has finished") in compared(tmp_path / "sweep")


@pytest.mark.slow
def test_help_and_a_terminal_without_unicode(write: Write, tmp_path: Path) -> None:
    code, out, _ = finish(spawn("--help", cwd=REPOSITORY, module="gptexp.compare"))
    assert code == 0
    assert "baseline=LABEL" in out
    runs = [write(2.0 + seed / 10, seed=seed, settings={"name": "中"}) for seed in (1, 2)]
    env = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    code, out, err = finish(spawn(str(runs[0].path.parent), cwd=tmp_path, module="gptexp.compare", env=env))
    assert (code, err) == (0, "")
    assert "2 runs: 2 done." in out


def test_a_level_in_brackets_is_shown(write: Write, compared: Compared, tmp_path: Path) -> None:
    for stats in (["batch"], ["batch", "time"]):
        write(2.0, 1, "batchnorm", model={"norms": {"batchnorm": {"stats": stats}}}, name=f"n{len(stats)}")
    assert 'stats=["batch", "time"]' in compared(tmp_path / "sweep")


def test_a_report_in_wandb(write: Write, compared: Compared, tmp_path: Path) -> None:
    for seed in range(6):
        write(2.0 + seed / 100, seed, settings={"logger": WANDB})
        write(1.9 + seed / 100, seed, "rmsnorm")
    report = tmp_path / "sweep" / "report"
    compared(report.parent)
    assert not (report / "wandb").exists()  # off by default
    out = compared(report.parent, "logger=wandb")
    (file,) = report.glob("wandb/offline-run-*/run-*.wandb")
    assert f"upload it later with: wandb sync {file.parent}" in out
    record = read_run(file)
    assert (record.name, record.group, record.job_type) == ("sweep comparison", "sweep", "compare")
    assert (record.project, record.exit_code) == ("mine", 0)  # the project of the runs
    assert json.loads(record.summary["best_variant"]) == "rmsnorm"
    assert json.loads(record.summary["runs"]) == 12
    assert "rmsnorm is better than layernorm" in json.loads(record.summary["headline"])
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


def test_an_empty_report_in_wandb(write: Write, compared: Compared, tmp_path: Path) -> None:
    write([], 7, status="running")
    compared(tmp_path / "sweep", "logger=wandb")
    (file,) = tmp_path.glob("sweep/report/wandb/offline-run-*/run-*.wandb")
    assert "No run has finished" in json.loads(read_run(file).summary["headline"])


@pytest.mark.parametrize("named", ["twice", "link", "runs", "run and sweep"])
def test_what_is_named_twice_or_in_part_counts_once(
    named: str, write: Write, compared: Compared, tmp_path: Path
) -> None:
    runs = [write(2.0 + seed / 10, seed=seed, norm=norm) for norm in ("layernorm", "rmsnorm") for seed in (1, 2)]
    sweep = runs[0].path.parent
    (sweep / "sweep.json").write_text(json.dumps({"jobs": [run.path.name for run in runs], "settings": {}}))
    (tmp_path / "link").symlink_to(sweep)
    folders = {
        "twice": [sweep, sweep], "link": [tmp_path / "link", sweep], "runs": [runs[0].path, runs[2].path],
        "run and sweep": [runs[0].path, sweep],
    }[named]  # fmt: skip
    count = 2 if named == "runs" else 4
    assert f"{count} runs: {count} done." in compared(*folders, f"output={tmp_path / 'report'}")
