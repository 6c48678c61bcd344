"""Whole runs, tiny ones, in this process: what they leave behind, how they end, and how they go on."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from gptexp.data.tokenizers import tokenizer_from_dict
from gptexp.errors import RunFailed, UserError
from gptexp.processes.group import processes
from gptexp.runs.files import read_metrics
from gptexp.runs.run import Run
from gptexp.training.launch import start
from gptexp.training.load import load_model, read_checkpoint
from tests.conftest import TINY, failing, timeless

Tiny = Callable[..., Run]
Command = Callable[..., int]
STUCK = ["optimizer.learning_rate=1e-12", "eval_interval=4"]  # so small a rate moves no weight


def steps_with(run: Run, column: str) -> list[float]:
    """The steps of metrics.csv that have a value in a column."""
    return [row["step"] for row in read_metrics(run.metrics_path) if column in row]


def test_what_a_run_leaves_behind(tiny: Tiny) -> None:
    run = tiny("run")
    rows, info, result = read_metrics(run.metrics_path), run.info, run.result
    assert [row["step"] for row in rows] == [0, 3, 6, 8, 9, 12, 15, 16, 18, 21, 24]
    assert steps_with(run, "val/loss") == [0, 8, 16, 24]
    assert rows[-1]["tokens"] == 24 * 4 * 16
    assert rows[-1]["val/loss"] < rows[0]["val/loss"]
    assert rows[0]["val/loss"] == pytest.approx(math.log(len(info["tokenizer"]["symbols"])), abs=0.1)
    evaluated = [row for row in rows if "val/loss" in row]
    for row in evaluated:
        assert row["val/perplexity"] == pytest.approx(math.exp(row["val/loss"]))
        assert row["val/bpc"] == pytest.approx(row["val/loss"] / math.log(2))
    flops = load_model(run, "last", len(info["tokenizer"]["symbols"])).flops_per_token()
    peaks = [row["tokens_per_second"] * flops / row["mfu"] for row in rows[1:]]
    assert peaks == pytest.approx([peaks[0]] * len(peaks))
    assert info["status"] == "done"
    assert {"config", "data", "code"} == set(info["fingerprints"])
    assert all(len(v) == 64 for v in info["fingerprints"].values())
    assert result is not None
    best = min(evaluated, key=lambda row: row["val/loss"])
    assert (result["best_val_loss"], result["best_step"]) == (best["val/loss"], best["step"])
    assert result["final"]["val/loss"] == rows[-1]["val/loss"]
    assert result["tokens_per_second"] > 0
    assert result["sampled_per_second"] > 0
    assert result["kv_cache_bytes"] == 2 * 4 * 16 * 16  # keys and values, float32, block_size, n_embd
    assert not result["stopped_early"]
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
    group: str, value: str, tiny: Tiny, command: Command, corpus: Path, tmp_path: Path
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


@pytest.mark.parametrize("norm", [
    "norm=layernorm", "norm=batchnorm", "norm=batchnorm model.norms.batchnorm.stats=[batch]",
])  # fmt: skip
def test_documents(norm: str, tiny: Tiny, tmp_path: Path) -> None:
    lines = [name * (1 + i % 3) for i, name in enumerate(["ada", "bo", "cleo", "dee", "eve"] * 20)]
    (tmp_path / "names.txt").write_text("\n".join(lines) + "\n")
    data = [f"data.path={tmp_path / 'names.txt'}", "task=documents", "task.terminator=.", *norm.split()]
    run = tiny("whole", *data)
    rows = read_metrics(run.metrics_path)
    assert rows[-1]["tokens"] < 24 * 4 * 13  # padding counts in nothing
    assert rows[-1]["val/loss"] < rows[0]["val/loss"]
    assert "." in run.info["tokenizer"]["symbols"]
    if norm == "norm=layernorm":
        cut = read_metrics(tiny("cut", *data, "gradient_accumulation_steps=2").metrics_path)
        assert [row["tokens"] for row in cut] == [row["tokens"] for row in rows]
        losses, others = ([row.get("train/loss", 0) for row in some] for some in (rows, cut))
        assert losses == pytest.approx(others, rel=1e-4)


def test_divergence_ends_the_run_with_advice_and_keeps_the_last_good_checkpoint(
    command: Command, corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    steep = ["optimizer=sgd", "optimizer.learning_rate=1e4", "grad_clip=0", "norm=none", "checkpoint_interval=1"]
    assert command(*TINY, f"data.path={corpus}", *steep, f"hydra.run.dir={tmp_path / 'run'}") == 1
    run = Run.open(tmp_path / "run")
    rows = read_metrics(run.metrics_path)
    assert capfd.readouterr().err == (
        f"error: {run.path}: diverged at step {rows[-1]['step']:.0f}: the loss or its gradient is no longer finite; "
        "lower optimizer.learning_rate, raise schedule.warmup_steps, or set grad_clip=1; the checkpoints before it are "
        "kept\n"
    )  # fmt: skip
    assert rows[-1]["step"] < 24
    assert not math.isfinite(rows[-1]["grad_norm"])
    kept = torch.load(run.checkpoint("last"), weights_only=True)
    assert kept["global_step"] < rows[-1]["step"]
    assert all(bool(v.isfinite().all()) for v in kept["state_dict"].values())
    assert run.result is not None
    assert run.info["status"] == run.result["status"] == "diverged"
    json.loads((run.path / "result.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_early_stop(tiny: Tiny) -> None:
    run = tiny("run", *STUCK, "early_stop_patience=2", "eval_windows=5")  # an equal loss is no improvement
    assert run.info["status"] == "done"
    assert run.result is not None
    assert run.result["stopped_early"]
    assert steps_with(run, "val/loss_windows") == [0, 4, 8]
    assert steps_with(run, "val/loss") == [8]  # the last evaluation is whole
    assert torch.load(run.checkpoint("best"), weights_only=True)["global_step"] == 0
    assert torch.load(run.checkpoint("last"), weights_only=True)["global_step"] == 8


def test_eval_windows(tiny: Tiny) -> None:
    some, whole = tiny("some", "eval_windows=5"), tiny("whole")
    a, b = read_metrics(some.metrics_path), read_metrics(whole.metrics_path)
    assert steps_with(some, "val/loss") == [24]
    assert steps_with(some, "val/loss_windows") == [0, 8, 16, 24]
    assert a[-1]["val/loss"] == b[-1]["val/loss"]
    assert a[0]["val/loss_windows"] != b[0]["val/loss"]
    assert some.result is not None
    assert some.result["best_val_loss"] == a[-1]["val/loss"]  # of the whole split, not of some windows
    assert [row["step"] for row in a] == [row["step"] for row in b]  # the last one, too, is one row


@pytest.mark.parametrize("override", [
    "data.tokenizer=byte", "optimizer=sgd", "optimizer=muon", "schedule=constant", "schedule=linear", "schedule=wsd",
    "model.position=rope", "model.position=sinusoidal", "model.position=none", "model.activation=swiglu",
    "model.activation=relu_squared", "model.tie_weights=false model.bias=true", "grad_clip=0",
    "hardware.precision=bf16-mixed", "hardware.precision=64-true", "hardware.precision=bf16-true",
    "logger=tensorboard", "model.dropout=0.2", "schedule.weight_decay_ratio=0", "batch_warmup_steps=20",
])  # fmt: skip
def test_every_choice_learns(override: str, tiny: Tiny) -> None:
    run = tiny("run", *override.split())
    rows = read_metrics(run.metrics_path)
    assert rows[-1]["val/loss"] < rows[0]["val/loss"]
    assert rows[-1]["val/bpc"] > 0
    if override == "logger=tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(run.path / "tensorboard"))
        events.Reload()
        written = {row["step"]: row["val/loss"] for row in rows if "val/loss" in row}
        assert {e.step: e.value for e in events.Scalars("val/loss")} == pytest.approx(written, rel=1e-6)


@pytest.mark.parametrize(("text", "prompt"), [("The end. " * 300, '"The "'), ("abc\n" * 600, '"..."')])
def test_the_command_that_is_told_works(
    text: str, prompt: str, tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It names a prompt only if the vocabulary has it."""
    (tmp_path / "own.txt").write_text(text)
    caplog.set_level("INFO", "gptexp")
    run = tiny("run", f"data.path={tmp_path / 'own.txt'}", "max_steps=2")
    assert f"python -m gptexp.sample run={run.path} prompt={prompt}" in caplog.text


@pytest.mark.slow
def test_a_compiled_model_learns_the_same(tiny: Tiny) -> None:
    plain, compiled = (read_metrics(tiny(f"run-{c}", f"hardware.compile={c}").metrics_path) for c in ("false", "true"))
    for row, other in zip(plain, compiled, strict=True):
        for key in {"train/loss", "val/loss", "grad_norm"} & row.keys():
            assert other[key] == pytest.approx(row[key], rel=1e-4)


def test_each_run_has_a_directory(
    command: Command, corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two of one name get two; one that the user names and that is taken is refused and left as it is."""
    settings = [*TINY, f"data.path={corpus}", "max_steps=1", f"output_dir={tmp_path}"]
    for _ in range(2):
        assert command(*settings) == 0
    path, _ = sorted((tmp_path / "runs").iterdir())
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    capfd.readouterr()
    assert command(*settings, f"hydra.run.dir={path}") == 2
    assert capfd.readouterr().err == (
        f"error: hydra.run.dir={path}: is taken; go on with its run by resume={path}, or name another directory\n"
    )
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_a_finished_run_can_be_trained_on(
    tiny: Tiny, command: Command, capfd: pytest.CaptureFixture[str]
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
    tiny: Tiny, command: Command, capfd: pytest.CaptureFixture[str]
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


class FailsOnce(Callback):
    """Ends a run between its last step and the evaluation of the whole validation split."""

    def __init__(self, folder: str) -> None:
        self.mark = Path(folder) / "failed"

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate" and not self.mark.exists():
            self.mark.touch()
            raise RuntimeError("on purpose")


def test_a_run_that_ends_before_its_last_evaluation_is_resumed_to_the_same_row(tiny: Tiny, tmp_path: Path) -> None:
    whole = tiny("whole", "eval_windows=5")
    fails = "+callbacks.fails._target_=tests.training.test_fit.FailsOnce"
    with pytest.raises(RunFailed, match="on purpose"):
        tiny("run", "eval_windows=5", fails, f"+callbacks.fails.folder={tmp_path}")
    run = Run.open(tmp_path / "run")
    start(run, processes())
    assert timeless(run) == timeless(whole)


def test_a_run_stopped_before_its_second_checkpoint_goes_on_as_unbroken(tiny: Tiny, killed: Callable[..., Run]) -> None:
    """It evaluates the untrained model again, which must not count as an evaluation without progress."""
    whole, run = tiny("whole", "early_stop_patience=1"), killed("run", 3, "early_stop_patience=1")
    assert timeless(run) == timeless(whole)
    assert run.result is not None
    assert whole.result is not None
    assert run.result["step"] == whole.result["step"] == 24


def test_a_run_killed_after_its_last_step_only_writes_its_results(tiny: Tiny) -> None:
    """Between the last checkpoint and the final status, with and without an early stop."""
    for name, overrides in (("whole", []), ("early", [*STUCK, "early_stop_patience=2"])):
        run = tiny(name, *overrides)
        before, result = timeless(run), run.result
        run.update(status="running")
        (run.path / "result.json").unlink()
        start(run, processes())
        assert timeless(run) == before
        assert run.info["status"] == "done"
        assert run.result == result


def test_the_rows_that_a_checkpoint_counts_must_be_there(finished: Run) -> None:
    """A machine that lost its power may have kept the checkpoint and lost rows."""
    held = finished.metrics_path.read_bytes()[:100]
    finished.metrics_path.write_bytes(held)
    with pytest.raises(UserError, match=rf"{finished.metrics_path}: holds 100 bytes, and "):
        start(finished, processes())
    assert finished.metrics_path.read_bytes() == held


def test_the_error_of_a_run_keeps_no_model_alive(tiny: Tiny) -> None:
    """A sweep keeps the errors of its jobs, and may have no memory for a second model."""
    with failing(20), pytest.raises(RunFailed) as caught:
        tiny("run")
    assert caught.value.__cause__ is not None
    trace, frames = caught.value.__cause__.__traceback__, 0
    while trace is not None:
        assert not any(isinstance(v, torch.nn.Module) for v in trace.tb_frame.f_locals.values())
        trace, frames = trace.tb_next, frames + 1
    assert frames > 5


class Evil:
    """Leaves a trace when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_checkpoint_is_unpickled(tmp_path: Path) -> None:
    torch.save({"gptexp": {"config": "x"}, "state_dict": {}, "more": Evil(tmp_path / "trace")}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"is not a checkpoint of gptexp \(UnpicklingError\)"):
        read_checkpoint(tmp_path / "a.ckpt", "run")
    assert not (tmp_path / "trace").exists()


def test_a_cpu_run_is_free_of_what_an_earlier_run_on_a_gpu_asked_for(tiny: Tiny) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        tiny("run", "max_steps=1")
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
