"""Every mistake: one clear line on standard error, status 2, no traceback, nothing written, torch not even loaded."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gptexp.runs import Run
from tests.conftest import TINY

WRONG: dict[str, list[str]] = {
    "model.nrom=rmsnorm": ["model.nrom=rmsnorm: unknown key; did you mean model.norm?"],
    "n_head=8": ["n_head=8: unknown key; did you mean model.n_head?"],
    "bathc_size=8": ["bathc_size=8: unknown key; did you mean batch_size?"],
    "norm=rmsnrom": ["norm=rmsnrom: unknown; did you mean rmsnorm? allowed: batchnorm, causal_batchnorm, dyt, "],
    "model.norm=rmsnrom": [
        "model.norm=rmsnrom: must be one of layernorm, rmsnorm, prmsnorm, scalenorm, dyt, groupnorm, batchnorm, "
        "rbn, causal_batchnorm, powernorm, none; did you mean rmsnorm?"],
    "model.placement=mid": ["model.placement=mid: must be one of pre, post, sandwich, output, deepnorm"],
    "model.n_head=3": ["model.n_head=3: must divide model.n_embd=16; nearest: 1, 2, 4"],
    "model.n_embd=-16": ["model.n_embd=-16: must be an integer of at least 1"],
    "model.n_layer=two": ["model.n_layer=two: must be an integer of at least 0"],
    "model.n_layer=2.5": ["model.n_layer=2.5: must be an integer of at least 0"],
    "model.n_layer=true": ["model.n_layer=true: must be an integer of at least 0"],
    "model.dropout=1": ["model.dropout=1: must be a number of at least 0 and less than 1"],
    "optimizer.learning_rate=nan": ["optimizer.learning_rate=NaN: must be a number greater than 0"],
    "optimizer.momentum=0.9": ["optimizer.momentum=0.9: unknown key of optimizer.name=adamw"],
    "schedule.decay_fraction=0.5": ["schedule.decay_fraction=0.5: unknown key of schedule.name=cosine"],
    "model.norms.rmsnorm.epsilon=1e-6": [
        "model.norms.rmsnorm.epsilon=1e-6: unknown key; the settings of rmsnorm are eps"],
    "model.norms.batchnorm.stats=[time]": [
        "model.norms.batchnorm.stats=[time]: must be [batch,time] or [batch]"],
    "model.block_size=10000": ["model.block_size=10000: longer than the training split"],
    "data.path=nowhere.txt": ["data.path=nowhere.txt: no such file"],
    "data.path=.": ["data.path=.: not a file"],
    "data.val_fraction=1.5": ["data.val_fraction=1.5: must be a number greater than 0 and less than 1"],
    "max_steps=0": ["max_steps=0: must be an integer of at least 1"],
    "seed=1,2": ["seed=1,2: several values need --multirun (-m)"],
    "sweep=norms": ["sweep=norms: needs --multirun (-m)"],
    "sweep.name=mine": ["sweep.name=mine: needs --multirun (-m)"],
    "hydra/sweeper=optuna hydra.sweeper.n_trials=3": [
        "hydra/sweeper=optuna: needs --multirun (-m)", "hydra.sweeper.n_trials=3: needs --multirun (-m)"],
    "hardware.precision=fp8": ["hardware.precision=fp8: must be one of auto, 32-true"],
    "gradient_accumulation_steps=3": ["batch_size=4: must be a multiple of hardware.devices=1 * "
                                      "gradient_accumulation_steps=3 = 3"],
    "hardware.compile=graph": ["hardware.compile=graph: must be true or false or graphs"],
    "hardware.compile=graphs": ["hardware.compile=graphs: needs a GPU, not hardware.accelerator=cpu"],
    "hardware=auto hardware.compile=graphs": ["hardware.compile=graphs: this machine has no NVIDIA GPU; allowed"],
    "hardware=ddp hardware.compile=graphs gradient_accumulation_steps=2": [
        "hardware.compile=graphs: needs hardware.strategy=auto, not ddp",
        "hardware.compile=graphs: needs gradient_accumulation_steps=1, not 2"],
    "hardware.threads=0": ["hardware.threads=0: must be an integer of at least 1 or auto or null"],
    "hardware.fast_mkl=2": ["hardware.fast_mkl=2: must be true or false"],
    "hardware=gpu": ["hardware.accelerator=gpu: this machine has none; allowed here: cpu"],
    "hardware=ddp": ["hardware.accelerator=gpu: this machine has none; allowed here: cpu"],
    "+norm=rmsnorm": ["+norm=rmsnorm: this group has a choice already; write norm=rmsnorm"],
    "resume=nowhere": ["resume=nowhere: there is no such directory"],
    "resume=.": ["resume=.: is not a run directory"],
    "experiment=nanogpt": ["experiment=nanogpt: unknown; did you mean nanogpt_gpu? allowed: fast_cpu, fast_gpu, "],
    "norm=groupnorm model.norms.groupnorm.groups=3": ["model.norms.groupnorm.groups=3: must divide the 16 channels"],
    "placement=deepnorm model.residual=false": ["model.residual=false: model.placement=deepnorm weighs the residual"],
    "model=bigram norm=rmsnorm": [
        f"model.{setting}: unknown key of model.name=bigram"
        for setting in ("norm=rmsnorm", "n_head=2", "n_layer=1", "n_embd=16")],
    "model.projection=false model.n_inner=24": ["model.n_inner=24: must be 0 or model.n_embd=16"],
    "rmsnorm": ["rmsnorm: cannot be read as a setting; a setting is written key=value"],
    "model.norm=[": ["model.norm=[: cannot be read as a setting; quote special characters"],
    "batch_size=1 norm=batchnorm model.norms.batchnorm.stats=[batch]": [
        "batch_size=1: model.norm=batchnorm as it is set needs at least 2 sequences"],
    "model.nrom=x model.n_embd=0 norm=rms bogus optimizer.beta1=2 seed=-1": [
        "bogus: cannot be read", "norm=rms: unknown; did you mean rmsnorm?", "model.nrom=x: unknown key",
        "model.n_embd=0: must be", "optimizer.beta1=2: must be", "seed=-1: must be"],
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_one_line_each(
    wrong: str, command: Callable[..., int], corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    path = [] if "data.path" in wrong else [f"data.path={corpus}"]
    assert command(*TINY, *path, *wrong.split(" ")) == 2
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert len(lines) == len(WRONG[wrong]), err
    for line, start in zip(lines, WRONG[wrong], strict=True):
        assert line.startswith(f"error: {start}"), err
    assert "Traceback" not in out + err
    assert not list(tmp_path.iterdir()), "a wrong command left something behind"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty"), (b"ok \xff\xfe", "offset 3"), ("éa".encode("utf-16"), "offset 0")],
)
def test_unreadable_text(
    content: bytes, message: str, command: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    out = tmp_path / "out"
    assert command(*TINY, f"data.path={tmp_path / 'text.txt'}", f"output_dir={out}") == 2
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1
    assert "data.path" in err
    assert message in err
    assert not out.exists()


def test_unwritable_folder(
    command: Callable[..., int], corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert command(*TINY, f"data.path={corpus}", f"output_dir={tmp_path / 'file'}") == 2
    assert f"output_dir={tmp_path / 'file'}: cannot write" in capfd.readouterr().err


def test_a_sweep_is_checked_before_its_first_job(
    command: Callable[..., int], corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sweep = ["-m", "norm=layernorm,rmsnrom", "model.n_layer=1,-1", "seed=range(0,3)"]
    assert command(*TINY, f"data.path={corpus}", f"output_dir={tmp_path / 'out'}", *sweep) == 2
    err = capfd.readouterr().err
    assert "norm=rmsnrom: unknown" in err
    assert "model.n_layer=-1: must be an integer of at least 0" in err
    assert not (tmp_path / "out").exists()


class TestResume:
    def test_a_finished_run(self, tiny: Callable[..., Run], command: Callable[..., int], capfd) -> None:  # type: ignore[no-untyped-def]
        run = tiny("run")
        before = run.metrics_path.read_bytes()
        assert command(f"resume={run.path}") == 2
        assert "this run is done" in capfd.readouterr().err
        assert run.metrics_path.read_bytes() == before

    def test_another_configuration(self, tiny: Callable[..., Run], command: Callable[..., int], capfd) -> None:  # type: ignore[no-untyped-def]
        run = tiny("run")
        run.update(status="interrupted")
        assert command(f"resume={run.path}", "model.norm=rmsnorm", "max_steps=99", "model.n_embd=16") == 2
        lines = capfd.readouterr().err.splitlines()
        assert run.info["status"] == "interrupted"
        assert [line.split(": ")[2].split(" ")[0] for line in lines] == ["model.norm=rmsnorm", "max_steps=99"]
        assert "differs from the run's model.norm=layernorm" in lines[0]

    def test_a_group_choice_that_is_the_default(
        self, tiny: Callable[..., Run], command: Callable[..., int], capfd: pytest.CaptureFixture[str]
    ) -> None:
        run = tiny("run", "norm=rmsnorm")
        run.update(status="interrupted")
        assert command(f"resume={run.path}", "norm=layernorm") == 2
        assert "model.norm=layernorm differs from the run's model.norm=rmsnorm" in capfd.readouterr().err

    @pytest.mark.parametrize("damage", ["missing", "foreign", "cut", "other run"])
    def test_a_bad_checkpoint(
        self, damage: str, tiny: Callable[..., Run], command: Callable[..., int], capfd: pytest.CaptureFixture[str]
    ) -> None:
        run = tiny("run")
        run.update(status="interrupted")
        last = run.checkpoint("last")
        content = last.read_bytes()
        if damage == "missing":
            last.unlink()
        elif damage == "foreign":
            last.write_bytes(b"not a checkpoint at all")
        elif damage == "cut":
            last.write_bytes(content[: len(content) // 2])
        else:
            last.write_bytes(tiny("other", "seed=7").checkpoint("last").read_bytes())
        before = run.metrics_path.read_bytes()
        for _ in range(2):  # a second try changes nothing either
            capfd.readouterr()
            assert command(f"resume={run.path}") == 2
            err = capfd.readouterr().err
            assert len(err.splitlines()) == 1
            assert "last.ckpt" in err
            assert run.metrics_path.read_bytes() == before


def test_no_torch_before_a_mistake_is_told(corpus: Path, tmp_path: Path) -> None:
    """What keeps a wrong command quick: neither torch nor lightning is imported before it is refused."""
    code = (
        "import sys, json\nfrom gptexp.train import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n"
        "    print(json.dumps([stop.code, [m for m in ('torch', 'lightning', 'wandb') if m in sys.modules]]))"
    )
    for wrong in ("model.n_head=3", "data.path=nowhere.txt", "model.block_size=99999", "resume=nowhere"):
        done = subprocess.run([sys.executable, "-c", code, *TINY, f"data.path={corpus}", wrong], cwd=tmp_path,
                              capture_output=True, text=True, check=True)  # fmt: skip
        assert json.loads(done.stdout.splitlines()[-1]) == [2, []], done.stderr
