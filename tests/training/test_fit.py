"""Whole runs, tiny ones, in this process."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from gptexp.data.tokenizer import tokenizer_from_dict
from gptexp.records import read_metrics
from gptexp.runs import Run
from gptexp.sample import load_model
from tests.conftest import TINY, timeless

Tiny = Callable[..., Run]


def test_what_a_run_leaves_behind(tiny: Tiny) -> None:
    run = tiny("run")
    rows = read_metrics(run.metrics_path)
    assert [row["step"] for row in rows] == [0, 3, 6, 8, 9, 12, 15, 16, 18, 21, 24]
    assert [row["step"] for row in rows if "val/loss" in row] == [0, 8, 16, 24]
    assert rows[-1]["tokens"] == 24 * 4 * 16
    assert rows[-1]["val/loss"] < rows[0]["val/loss"]
    assert rows[0]["val/loss"] == pytest.approx(math.log(len(run.info["tokenizer"]["symbols"])), abs=0.1)
    for row in rows:
        if "val/loss" in row:
            assert row["val/perplexity"] == pytest.approx(math.exp(row["val/loss"]))
            assert row["val/bpc"] == pytest.approx(row["val/loss"] / math.log(2))
    info, result = run.info, run.result
    assert info["status"] == "done"
    assert {"config", "data", "code"} == set(info["fingerprints"])
    assert all(len(v) == 64 for v in info["fingerprints"].values())
    assert result is not None
    best = min(rows, key=lambda row: row.get("val/loss", math.inf))
    assert (result["best_val_loss"], result["best_step"]) == (best["val/loss"], best["step"])
    assert result["final"]["val/loss"] == rows[-1]["val/loss"]
    assert result["tokens_per_second"] > 0
    assert sorted(p.name for p in run.checkpoint("best").parent.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert run.samples_path.read_text().count("--- step ") == 4
    assert run.curves_path.read_bytes().startswith(b"\x89PNG")
    assert yaml.safe_load((run.path / "config.yaml").read_text())["model"]["n_embd"] == 16


def test_val_loss_is_the_mean_over_every_token_of_the_split(tiny: Tiny, corpus: Path) -> None:
    run = tiny("run")
    ids = torch.from_numpy(tokenizer_from_dict(run.info["tokenizer"]).encode(corpus.read_text()).astype("int64"))
    start = int(len(ids) * 0.9)
    model = load_model(run, "last", len(run.info["tokenizer"]["symbols"])).double()
    losses = []
    with torch.no_grad():
        for at in range(start, len(ids), 16):  # windows of block_size, each target once
            stop = min(at + 16, len(ids))
            log_probs = model(ids[None, at - 1 : stop - 1]).log_softmax(-1)[0]
            losses.append(-log_probs[torch.arange(stop - at), ids[at:stop]])
    every = torch.cat(losses)
    assert len(every) == len(ids) - start
    assert read_metrics(run.metrics_path)[-1]["val/loss"] == pytest.approx(every.mean().item(), rel=1e-5)


@pytest.mark.parametrize(("group", "value"), [
    ("norm=rmsnorm", "model.norm=rmsnorm"), ("placement=post", "model.placement=post"), ("heads=h4", "model.n_head=4"),
])  # fmt: skip
def test_a_group_and_a_value_are_the_same(
    group: str, value: str, tiny: Tiny, command: Callable[..., int], corpus: Path, tmp_path: Path
) -> None:
    without = [setting for setting in TINY if setting.partition("=")[0] != group.partition("=")[0]]
    assert command(*without, f"data.path={corpus}", f"hydra.run.dir={tmp_path / 'other'}", value) == 0
    one, other, default = tiny("one", group), Run.open(tmp_path / "other"), tiny("default")
    assert timeless(one) == timeless(other) != timeless(default)
    assert one.samples_path.read_bytes() == other.samples_path.read_bytes()
    assert one.info["fingerprints"]["config"] == other.info["fingerprints"]["config"]


def test_gradient_accumulation_changes_nothing_but_rounding(tiny: Tiny) -> None:
    whole, cut = tiny("whole"), tiny("cut", "gradient_accumulation_steps=4")
    for a, b in zip(read_metrics(whole.metrics_path), read_metrics(cut.metrics_path), strict=True):
        same = {"step", "tokens", "train/loss", "grad_norm", "val/loss"} & set(a)
        assert {k: a[k] for k in same} == pytest.approx({k: b[k] for k in same}, rel=1e-4)


def test_documents(tiny: Tiny, tmp_path: Path) -> None:
    lines = [name * (1 + i % 3) for i, name in enumerate(["ada", "bo", "cleo", "dee", "eve"] * 20)]
    (tmp_path / "names.txt").write_text("\n".join(lines) + "\n")
    data = [f"data.path={tmp_path / 'names.txt'}", "data.documents=true", "data.terminator=."]
    whole, cut = tiny("whole", *data), tiny("cut", *data, "gradient_accumulation_steps=2")
    rows = read_metrics(whole.metrics_path)
    for a, b in zip(rows, read_metrics(cut.metrics_path), strict=True):
        assert a.get("train/loss", 0) == pytest.approx(b.get("train/loss", 0), rel=1e-4)
        assert a["tokens"] == b["tokens"]
    assert rows[-1]["tokens"] < 24 * 4 * 13  # padding counts in nothing
    assert rows[-1]["val/loss"] < rows[0]["val/loss"]
    assert "." in whole.info["tokenizer"]["symbols"]


@pytest.mark.parametrize("norm", ["norm=batchnorm", "norm=batchnorm model.norms.batchnorm.stats=[batch]"])
def test_documents_with_batchnorm(norm: str, tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("\n".join(["ada", "bobo", "clementine"] * 20))
    run = tiny("run", f"data.path={tmp_path / 'names.txt'}", "data.documents=true", *norm.split())
    rows = read_metrics(run.metrics_path)
    assert rows[-1]["val/loss"] < rows[0]["val/loss"]


def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(
    tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    steep = ["optimizer=sgd", "optimizer.learning_rate=1e4", "grad_clip=0"]
    run = tiny("run", "norm=none", *steep, "checkpoint_interval=1")
    assert run.info["status"] == "diverged"
    rows = read_metrics(run.metrics_path)
    assert rows[-1]["step"] < 24
    assert not math.isfinite(rows[-1]["grad_norm"])
    assert "diverged at step" in caplog.text
    kept = torch.load(run.checkpoint("last"), weights_only=True)
    assert kept["global_step"] < rows[-1]["step"]
    assert all(bool(v.isfinite().all()) for v in kept["state_dict"].values())
    assert run.result is not None
    assert run.result["status"] == "diverged"
    json.loads((run.path / "result.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_early_stop(tiny: Tiny) -> None:
    # So small a rate moves no weight, and an equal loss is no improvement.
    run = tiny("run", "optimizer.learning_rate=1e-12", "early_stop_patience=2", "eval_interval=4", "eval_windows=5")
    rows = read_metrics(run.metrics_path)
    assert run.info["status"] == "done"
    assert run.result is not None
    assert run.result["stopped_early"]
    assert [row["step"] for row in rows if "val/loss_windows" in row] == [0, 4, 8]
    assert [row["step"] for row in rows if "val/loss" in row] == [8]  # the last evaluation is whole


def test_a_run_without_progress_keeps_its_first_checkpoint_as_best(tiny: Tiny) -> None:
    run = tiny("run", "optimizer.learning_rate=1e-12")
    assert torch.load(run.checkpoint("best"), weights_only=True)["global_step"] == 0
    assert torch.load(run.checkpoint("last"), weights_only=True)["global_step"] == 24


def test_eval_windows(tiny: Tiny) -> None:
    some, whole = tiny("some", "eval_windows=5"), tiny("whole")
    a, b = read_metrics(some.metrics_path), read_metrics(whole.metrics_path)
    assert [row["step"] for row in a if "val/loss" in row] == [24]
    assert [row["step"] for row in a if "val/loss_windows" in row] == [0, 8, 16, 24]
    assert a[-1]["val/loss"] == b[-1]["val/loss"]
    assert a[0]["val/loss_windows"] != b[0]["val/loss"]
    assert some.result is not None
    assert some.result["best_val_loss"] == a[-1]["val/loss"]  # of the whole split, not of some windows
    assert [row["step"] for row in a] == [row["step"] for row in b]  # the last one, too, is one row


class FailsOnce(Callback):
    """Ends a run between its last step and the evaluation of the whole validation split."""

    def __init__(self, folder: str) -> None:
        self.mark = Path(folder) / "failed"

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate" and not self.mark.exists():
            self.mark.touch()
            raise RuntimeError("on purpose")


def test_a_run_that_ends_before_its_last_evaluation_is_resumed_to_the_same_row(
    tiny: Tiny, command: Callable[..., int], corpus: Path, tmp_path: Path
) -> None:
    whole = tiny("whole", "eval_windows=5")
    fails = "+callbacks.fails._target_=tests.training.test_fit.FailsOnce"
    arguments = [*TINY, f"data.path={corpus}", "eval_windows=5", fails, f"+callbacks.fails.folder={tmp_path}"]
    assert command(*arguments, f"hydra.run.dir={tmp_path / 'run'}") == 1
    assert command(f"resume={tmp_path / 'run'}", fails) == 0
    assert timeless(Run.open(tmp_path / "run")) == timeless(whole)


@pytest.mark.parametrize("override", [
    "data.tokenizer=byte", "optimizer=sgd", "optimizer=muon", "schedule=constant", "schedule=linear", "schedule=wsd",
    "model.position=rope", "model.position=sinusoidal", "model.position=none", "model.activation=swiglu",
    "model.activation=relu_squared", "model.tie_weights=false model.bias=true", "grad_clip=0",
    "hardware.precision=bf16-mixed", "hardware.precision=64-true", "hardware.precision=bf16-true",
    "logger=tensorboard", "model.dropout=0.2",
])  # fmt: skip
def test_every_choice_learns(override: str, tiny: Tiny) -> None:
    rows = read_metrics(tiny("run", *override.split()).metrics_path)
    assert rows[-1]["val/loss"] < rows[0]["val/loss"]
    assert rows[-1]["val/bpc"] > 0


@pytest.mark.slow
def test_a_compiled_model_learns_the_same(tiny: Tiny) -> None:
    plain, compiled = (read_metrics(tiny(f"run-{c}", f"hardware.compile={c}").metrics_path) for c in ("false", "true"))
    for row, other in zip(plain, compiled, strict=True):
        for key in {"train/loss", "val/loss", "grad_norm"} & row.keys():
            assert other[key] == pytest.approx(row[key], rel=1e-4)


def test_tensorboard_holds_the_metrics(tiny: Tiny) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tiny("run", "logger=tensorboard")
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    logged = {e.step: e.value for e in events.Scalars("val/loss")}
    written = {row["step"]: row["val/loss"] for row in read_metrics(run.metrics_path) if "val/loss" in row}
    assert logged == pytest.approx(written, rel=1e-6)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "batchnorm"])
@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("heads", [2, 4])
def test_variants_train_for_200_steps(norm: str, placement: str, heads: int, tiny: Tiny) -> None:
    run = tiny("run", f"norm={norm}", f"placement={placement}", f"heads=h{heads}", "max_steps=200", "eval_interval=100")
    rows = read_metrics(run.metrics_path)
    assert run.info["status"] == "done"
    assert rows[-1]["val/loss"] < rows[0]["val/loss"] - 0.3


def test_two_runs_of_one_name_get_two_directories(
    command: Callable[..., int], corpus: Path, tmp_path: Path
) -> None:
    for _ in range(2):
        assert command(*TINY, f"data.path={corpus}", "max_steps=1", f"output_dir={tmp_path}") == 0
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_a_directory_that_is_taken_is_refused(
    command: Callable[..., int], corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = [*TINY, f"data.path={corpus}", "max_steps=1", f"hydra.run.dir={tmp_path / 'run'}"]
    assert command(*settings) == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    capfd.readouterr()
    assert command(*settings) == 2
    path = tmp_path / "run"
    assert capfd.readouterr().err == (
        f"error: hydra.run.dir={path}: is taken; go on with its run by resume={path}, or name another directory\n"
    )
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_finished_run_can_be_trained_on(
    tiny: Tiny, command: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where the schedule does not end with the run: as if it had been begun with all those steps."""
    whole, short = tiny("whole", "schedule=constant", "max_steps=40"), tiny("short", "schedule=constant")
    assert command(f"resume={short.checkpoint('last')}", "max_steps=40") == 0
    assert timeless(short) == timeless(whole)
    assert short.info["status"] == "done"
    assert short.config.max_steps == 40
    assert short.result is not None
    assert short.result["step"] == 40
    capfd.readouterr()
    assert command(f"resume={short.path}") == 2
    assert "this run is done; max_steps above 40 trains it on" in capfd.readouterr().err


def test_a_decayed_run_is_trained_on_with_the_schedule_that_is_named(
    tiny: Tiny, command: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    run = tiny("run")
    assert command(f"resume={run.path}", "max_steps=40") == 2
    assert "name the schedule to go on with, such as schedule=constant" in capfd.readouterr().err
    assert command(f"resume={run.path}", "max_steps=40", "model.n_embd=32") == 2
    assert "model.n_embd=32 differs" in capfd.readouterr().err
    assert command(f"resume={run.path}", "max_steps=40", "schedule=constant") == 0
    rates = {row["step"]: row["learning_rate"] for row in read_metrics(run.metrics_path) if "learning_rate" in row}
    assert rates[40] == 1e-3 > rates[24]
    assert run.config.schedule.name == "constant"


def test_a_cpu_run_is_free_of_what_an_earlier_run_on_a_gpu_asked_for(tiny: Tiny) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        tiny("run", "max_steps=1")
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
