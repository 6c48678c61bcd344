"""Every mistake: one clear line on standard error, status 2, no traceback, nothing written, torch not even loaded."""

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import hydra
import pytest
import yaml

import gptexp
from gptexp.runs import Run
from gptexp.training.module import GPTModule
from tests.conftest import REPOSITORY, TINY, finish, spawn

WRONG: dict[str, list[str]] = {
    "model.norm=rmsnrom model.placement=mid model.n_embd=-16 model.n_layer=two model.dropout=1 "
    "optimizer.learning_rate=nan optimizer.momentum=0.9 schedule.decay_fraction=0.5 "
    "model.norms.rmsnorm.epsilon=0.1 data.val_fraction=1.5 max_steps=0 "
    "hardware.precision=fp8 hardware.compile=graph hardware.threads=0 hardware.fast_mkl=2": [
        "model.norm=rmsnrom: must be one of layernorm, rmsnorm, prmsnorm, scalenorm, dyt, groupnorm, batchnorm, "
        "rbn, causal_batchnorm, powernorm, none; did you mean rmsnorm?",
        "model.placement=mid: must be one of pre, post, sandwich, output, deepnorm",
        "model.n_embd=-16: must be an integer of at least 1",
        "model.n_layer=two: must be an integer of at least 0",
        "model.dropout=1: must be a number of at least 0 and less than 1",
        "optimizer.learning_rate=NaN: must be a number greater than 0",
        "optimizer.momentum=0.9: unknown key of optimizer.name=adamw",
        "schedule.decay_fraction=0.5: unknown key of schedule.name=cosine",
        "model.norms.rmsnorm.epsilon=0.1: unknown key; did you mean eps?",
        "data.val_fraction=1.5: must be a number greater than 0 and less than 1",
        "max_steps=0: must be an integer of at least 1",
        "hardware.precision=fp8: must be one of auto, 32-true",
        "hardware.compile=graph: must be true or false or graphs",
        "hardware.threads=0: must be an integer of at least 1 or auto or null",
        "hardware.fast_mkl=2: must be true or false"],
    "model.norms.batchnorm.stats=[time]": ["model.norms.batchnorm.stats=[time]: must be [batch,time] or [batch]"],
    "model.n_layer=2.5 model.norms.rmsnorm.momentum=0.1": [
        "model.n_layer=2.5: must be an integer of at least 0",
        "model.norms.rmsnorm.momentum=0.1: unknown key; allowed: eps"],
    "model.nrom=rmsnorm n_head=8 bathc_size=8 lr=3e-4 optimizer.lr=1e-3 epochs=3 wandb=false "
    "optimiser=muon device=cuda model.ema=0.99 callbacks.mine.patience=3": [
        "model.nrom=rmsnorm: unknown key; did you mean model.norm?",
        "n_head=8: unknown key; did you mean model.n_head?",
        "bathc_size=8: unknown key; did you mean batch_size?",
        "lr=3e-4: unknown key; did you mean optimizer.learning_rate?",
        "optimizer.lr=1e-3: unknown key; did you mean optimizer.learning_rate?",
        "epochs=3: unknown key; the length of training is set in optimizer steps, max_steps",
        "wandb=false: unknown key; choose with logger=wandb, logger=none or logger.wandb.mode=offline",
        "optimiser=muon: unknown key; did you mean optimizer=muon?",
        "device=cuda: unknown key; did you mean hardware=gpu?",
        "model.ema=0.99: unknown key",
        "callbacks.mine.patience=3: unknown key; to add it, write +callbacks.mine.patience=3"],
    "norm=rmsnrom heads=3 placement=mid hardware=cuda data=mytext.txt experiment=nanogpt": [
        "norm=rmsnrom: unknown; did you mean rmsnorm? allowed: batchnorm, causal_batchnorm, dyt, ",
        "heads=3: unknown; did you mean model.n_head=3? allowed: h1, ",
        "placement=mid: unknown; allowed: deepnorm, ",
        "hardware=cuda: unknown; did you mean gpu? allowed: auto, cpu, ddp, ",
        "data=mytext.txt: unknown; did you mean data=file data.path=mytext.txt? allowed: file, ",
        "experiment=nanogpt: unknown; did you mean nanogpt_gpu? allowed: fast_cpu, fast_gpu, "],
    "norm=RMSNorm heads=8 experiment=null": [
        "norm=RMSNorm: unknown; did you mean rmsnorm? allowed: ",
        "heads=8: unknown; did you mean h8? allowed: h1, ",
        "experiment=null: unknown; allowed: fast_cpu, "],
    "~norm ~seed logger=null schedule=null": [
        "~norm: cannot be left out; allowed: batchnorm, causal_batchnorm, ",
        "~seed: cannot be left out; write seed=VALUE",
        "logger=null: cannot be left out; allowed: csv, mlflow, none, ",
        "schedule=null: cannot be left out; allowed: constant, cosine, linear, wsd"],
    ". rmsnorm model.norm=[ norm=rmsnorm,": [
        "rmsnorm: cannot be read as a setting; a setting is written key=value",
        "model.norm=[: cannot be read as a setting; quote special characters",
        "norm=rmsnorm,: cannot be read as a setting; a list of values ends without a comma",
        ".: cannot be read as a setting; a setting is written key=value; did you mean resume=.?"],
    "seed=1,2 sweep=norms sweep.name=mine hydra/sweeper=optuna hydra.sweeper.n_trials=3": [
        "seed=1,2: several values need --multirun (-m)",
        "sweep=norms: needs --multirun (-m)",
        "sweep.name=mine: needs --multirun (-m)",
        "hydra/sweeper=optuna: needs --multirun (-m)",
        "hydra.sweeper.n_trials=3: needs --multirun (-m)"],
    "+norm=rmsnorm hydra.verbose=true,false": [
        "+norm=rmsnorm: this group has a choice already; write norm=rmsnorm",
        "hydra.verbose=true,false: a setting of Hydra's own has one value"],
    "model.n_embd=15": ["model.n_head=2: must divide model.n_embd=15; nearest: 1, 3, 5"],
    "model.n_head=3": ["model.n_head=3: heads=h2 sets model.n_head, too; leave one of them out",
                       "model.n_head=3: must divide model.n_embd=16; nearest: 1, 2, 4"],
    "model.n_layer=true": ["model.n_layer=true: must be an integer of at least 0"],
    "model.block_size=10000": ["model.block_size=10000: longer than the training split"],
    "data.path=nowhere.txt": ["data.path=nowhere.txt: no such file"],
    "data.path=nowhere.txt hydra.run.dir=run": ["data.path=nowhere.txt: no such file"],
    "data.path=.": ["data.path=.: not a file"],
    "gradient_accumulation_steps=3": ["batch_size=4: must be a multiple of hardware.devices=1 * "
                                      "gradient_accumulation_steps=3 = 3"],
    "hardware.compile=graphs": ["hardware.compile=graphs: needs a GPU, not hardware.accelerator=cpu"],
    "hardware=auto hardware.compile=graphs": ["hardware.compile=graphs: this machine has no NVIDIA GPU; allowed"],
    "hardware=ddp hardware.compile=graphs gradient_accumulation_steps=2": [
        "hardware.compile=graphs: needs hardware.strategy=auto, not ddp",
        "hardware.compile=graphs: needs gradient_accumulation_steps=1, not 2"],
    "hardware=gpu": ["hardware.accelerator=gpu: this machine has none; allowed here: cpu"],
    "hardware=ddp": ["hardware.accelerator=gpu: this machine has none; allowed here: cpu"],
    "resume=nowhere": ["resume=nowhere: there is no such directory"],
    "resume=.": ["resume=.: is not a run directory"],
    "norm=groupnorm model.norms.groupnorm.groups=3": ["model.norms.groupnorm.groups=3: must divide the 16 channels"],
    "placement=deepnorm model.residual=false": ["model.residual=false: model.placement=deepnorm weighs the residual"],
    "model=bigram norm=rmsnorm": [
        f"model.{setting}: unknown key of model.name=bigram"
        for setting in ("norm=rmsnorm", "n_head=2", "n_layer=1", "n_embd=16")],
    "model.projection=false model.n_inner=24": ["model.n_inner=24: must be 0 or model.n_embd=16"],
    "batch_size=1 norm=batchnorm model.norms.batchnorm.stats=[batch]": [
        "batch_size=1: model.norm=batchnorm as it is set needs at least 2 sequences"],
    # The words of other programs.
    "norm=layer_norm": ["norm=layer_norm: unknown; did you mean layernorm? allowed: "],
    "resume=true": ["resume=true: must be a run directory, or auto for the newest unfinished run of this config"],
    "resume=latest": ["resume=latest: must be a run directory, or auto for the newest unfinished run"],
    # Choices that cannot be left out, and such as contradict a value.
    "norm=rmsnrom norm=none seed=-2 seed=-1": ["seed=-1: must be an integer of at least 0"],  # the last one counts
    "model.norm=batchnorm norm=layernorm": [
        "norm=layernorm: model.norm=batchnorm sets model.norm, too; leave one of them out"],
    "norm=layernorm model.norm=batchnorm": [
        "model.norm=batchnorm: norm=layernorm sets model.norm, too; leave one of them out"],
    "optimizer=sgd optimizer.name=muon": [
        "optimizer.name=muon: optimizer=sgd sets optimizer.name, too; leave one of them out",
        "optimizer.nesterov=false: unknown key of optimizer.name=muon"],
    "max_steps=8 trainer.max_steps=9": ["trainer.max_steps=9: max_steps=8 sets max_steps, too; leave one of them out"],
    "eval_interval=4 +trainer.val_check_interval=4": [
        "+trainer.val_check_interval=4: eval_interval=4 sets eval_interval, too; leave one of them out"],
    # Sweeps without -m.
    "experiment=known/rmsnorm": ["experiment=known/rmsnorm: is a sweep over seed, norm; needs --multirun (-m)"],
    # The shell's spaces, and dashes.
    "norm = rmsnorm": ["norm = rmsnorm: a setting has no spaces; write norm=rmsnorm"],
    "norm =rmsnrom": ["norm =rmsnrom: a setting has no spaces; write norm=rmsnrom", "norm=rmsnrom: unknown; did you "],
    "norm= rmsnorm": ["norm= rmsnorm: a setting has no spaces; write norm=rmsnorm"],
    "model.norms.batchnorm.stats=[batch, time]": [
        "model.norms.batchnorm.stats=[batch, time]: a setting has no spaces; write model.norms.batchnorm.stats=[batch"],
    "--norm=rmsnorm": ["--norm=rmsnorm: a setting has no dashes; write norm=rmsnorm"],
    "--norm rmsnrom": ["--norm rmsnrom: a setting has no dashes; write norm=rmsnrom", "norm=rmsnrom: unknown; did "],
    "--norm": ["--norm: unknown option; --hydra-help lists the options, --help the settings"],
    "++norm=rmsnorm": ["++norm=rmsnorm: this group has a choice already; write norm=rmsnorm"],
    # Hydra's own settings, and its folders.
    "hydra.bogus=1": ["Could not override 'hydra.bogus'. To append to your config use +hydra.bogus=1"],
    "hydra.mode=FOO seed=-1": ["Error merging override hydra.mode=FOO Invalid value 'FOO'", "seed=-1: must be"],
    "hydra.run.dir=/etc/passwd/run": ["hydra.run.dir=/etc/passwd/run: cannot be made (cannot write /etc/passwd)"],
    "hydra.run.dir=${nowhere}": ["Interpolation key 'nowhere' not found"],
    "+bogus=1": ["bogus=1: unknown key"],
    "logger=wandb logger.wandb.projct=x": ["logger.wandb.projct=x: unknown key; did you mean logger.wandb.project?"],
    "logger=[none,nonsense]": ["logger=nonsense: unknown; did you mean none? allowed: csv, "],
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
    for start in WRONG[wrong]:
        assert sum(line.startswith(f"error: {start}") for line in lines) == 1, err
    assert "Traceback" not in out + err
    assert not list(tmp_path.iterdir()), "a wrong command left something behind"


WRONG_SWEEPS = {
    "norm=layernorm, rmsnorm seed=-1": [
        "norm=layernorm, rmsnorm: a setting has no spaces; write norm=layernorm,rmsnorm", "seed=-1: must be"],
    "norm=layernorm,rmsnorm model.norm=batchnorm": [
        "model.norm=batchnorm: norm=layernorm,rmsnorm sets model.norm, too; leave one of them out"],
    "sweep=norms norm=rmsnorm": [
        "norm=rmsnorm: model.norm=layernorm,rmsnorm,batchnorm sets model.norm, too; write model.norm=VALUE to choose "],
    "experiment=known/rmsnorm model.norm=none": [
        "model.norm=none: norm=layernorm,rmsnorm sets model.norm, too; write norm=VALUE to choose from the sweep's"],
    "norm=glob(zzz*)": ["norm=glob(zzz*): names no choice; allowed: batchnorm, "],
    "optimizer.learning_rate=interval(0.1,1)": [
        "optimizer.learning_rate=interval(0.1,1): values without number need a search, hydra/sweeper=optuna"],
    "hydra/launcher=jobli hydra.launcher.n_jobs=2 seed=1,-1": [
        "hydra/launcher=jobli: unknown; did you mean joblib? allowed: basic, ", "seed=-1: must be"],
    "hydra/sweeper=basic seed=1,2": ["hydra/sweeper=basic: needs sweep.name=NAME, the folder of its jobs"],
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_SWEEPS)
def test_one_line_each_in_a_sweep(
    wrong: str, command: Callable[..., int], corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command("-m", *TINY, f"data.path={corpus}", f"output_dir={tmp_path}", *wrong.split(" ")) == 2
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert len(lines) == len(WRONG_SWEEPS[wrong]), err
    for line, start in zip(lines, WRONG_SWEEPS[wrong], strict=True):
        assert line.startswith(f"error: {start}"), err
    assert "Traceback" not in out + err
    assert not list(tmp_path.iterdir())


class TestFlags:
    @pytest.mark.parametrize(("arguments", "told"), [
        (["seed=1,2", "-m", "norm=layernorm,none"], "-m: stands between settings; write it before them: -m seed=1,2"),
        (["-cd", "nowhere"], "--config-dir nowhere: there is no such folder"),
        (["--cfg", "job", "norm=rmsnrom"], "norm=rmsnrom: unknown; did you mean rmsnorm? allowed: "),
        (["--cfg", "job", "sede=3"], "Could not override 'sede'. To append to your config use +sede=3"),
        (["--help", "norm=rmsnrom"], "norm=rmsnrom: unknown; did you mean rmsnorm? allowed: "),
        (["--cfg", "jobs"], "argument --cfg/-c: invalid choice: 'jobs' (choose from "),
    ])  # fmt: skip
    def test_one_line(
        self, arguments: list[str], told: str, command: Callable[..., int], capfd: pytest.CaptureFixture[str]
    ) -> None:
        assert command(*arguments) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith(f"error: {told}")

    def test_a_configuration_is_shown_even_if_it_is_wrong(
        self, command: Callable[..., int], capfd: pytest.CaptureFixture[str]
    ) -> None:
        assert command("--cfg", "job", "norm=rmsnorm", "model.n_embd=-1") == 0
        tree = yaml.safe_load(capfd.readouterr().out)
        assert (tree["model"]["norm"], tree["model"]["n_embd"]) == ("rmsnorm", -1)

    def test_help_and_versions(self, command: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> None:
        assert command("--help") == 0
        out = capfd.readouterr().out
        assert "\nnorm: batchnorm, causal_batchnorm, dyt, " in out
        assert "\nmax_steps: 2000\n" in out
        assert command("--hydra-help") == 0
        assert "--multirun,-m" in capfd.readouterr().out
        assert command("--version") == 0
        assert capfd.readouterr().out == f"gptexp {gptexp.__version__} (Hydra {hydra.__version__})\n"

    def test_hydras_account_of_the_defaults(self, tmp_path: Path) -> None:
        code, out, err = finish(spawn("--info", "defaults", "norm=rmsnorm", cwd=tmp_path))
        assert (code, err) == (0, "")
        assert "| norm/rmsnorm " in out

    def test_completion(
        self, command: Callable[..., int], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        line = "gptexp-train norm=rms"
        monkeypatch.setenv("COMP_LINE", line)
        monkeypatch.setenv("COMP_POINT", str(len(line)))
        assert command("-sc", "query=bash") == 0
        assert capfd.readouterr().out.split() == ["norm=rmsnorm"]

    def test_a_folder_of_ones_own(
        self, command: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "heads").mkdir()
        (tmp_path / "heads" / "h5.yaml").write_text("# @package _global_\nmodel:\n  n_head: 5\n")
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "short.yaml").write_text("# @package _global_\nmax_steps: 7\n")
        chosen = ["-cd", str(tmp_path), "heads=h5", "+mine=short"]
        assert command("--cfg", "job", *chosen) == 0
        tree = yaml.safe_load(capfd.readouterr().out)
        assert (tree["model"]["n_head"], tree["max_steps"]) == (5, 7)
        assert command(*chosen, "seed=-1") == 2  # the others are chosen, or this would be more than these two lines
        assert [line.partition(": must")[0] for line in capfd.readouterr().err.splitlines()] == [
            "error: seed=-1", "error: model.n_head=5"]  # fmt: skip
        assert command(*chosen, "heads=h55") == 2
        assert "heads=h55: unknown; did you mean h5? allowed: h1, h12, h16, h2, h4, h5, " in capfd.readouterr().err


def test_the_package_itself_lists_its_commands() -> None:
    done = subprocess.run([sys.executable, "-m", "gptexp"], capture_output=True, text=True, check=True)
    listed = {line.split()[2] for line in done.stdout.splitlines() if line.startswith("    python -m gptexp.")}
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    assert listed == {target.partition(":")[0] for target in scripts.values()}


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
    sweep = ["norm=layernorm,rmsnrom", "model.n_layer=1,-1", "seed=range(0,3)"]
    assert command("-m", *TINY, f"data.path={corpus}", f"output_dir={tmp_path / 'out'}", *sweep) == 2
    err = capfd.readouterr().err
    assert "norm=rmsnrom: unknown" in err
    assert "model.n_layer=-1: must be an integer of at least 0" in err
    assert not (tmp_path / "out").exists()


class TestResume:
    def test_a_finished_run(self, finished: Run, command: Callable[..., int], capfd) -> None:  # type: ignore[no-untyped-def]
        run = finished
        before = run.metrics_path.read_bytes()
        assert command(f"resume={run.path}") == 2
        assert "this run is done" in capfd.readouterr().err
        assert run.metrics_path.read_bytes() == before

    def test_another_configuration(self, finished: Run, command: Callable[..., int], capfd) -> None:  # type: ignore[no-untyped-def]
        run = finished
        run.update(status="interrupted")
        assert command(f"resume={run.path}", "model.norm=rmsnorm", "batch_size=8", "model.n_embd=16") == 2
        lines = capfd.readouterr().err.splitlines()
        assert run.info["status"] == "interrupted"
        assert [line.split(": ")[2].split(" ")[0] for line in lines] == ["model.norm=rmsnorm", "batch_size=8"]
        assert "differs from the run's model.norm=layernorm" in lines[0]

    def test_a_group_choice_that_is_the_default(
        self, tiny: Callable[..., Run], command: Callable[..., int], capfd: pytest.CaptureFixture[str]
    ) -> None:
        run = tiny("run", "norm=rmsnorm")
        run.update(status="interrupted")
        assert command(f"resume={run.path}", "norm=layernorm") == 2
        assert "model.norm=layernorm differs from the run's model.norm=rmsnorm" in capfd.readouterr().err

    @pytest.mark.parametrize("damage", ["missing", "foreign", "cut", "hole", "other run"])
    def test_a_bad_checkpoint(
        self, damage: str, finished: Run, tiny: Callable[..., Run], command: Callable[..., int],
        capfd: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        run = finished
        run.update(status="interrupted")
        last = run.checkpoint("last")
        content = last.read_bytes()
        if damage == "missing":
            last.unlink()
        elif damage == "foreign":
            last.write_bytes(b"not a checkpoint at all")
        elif damage == "cut":
            last.write_bytes(content[: len(content) // 2])
        elif damage == "hole":  # zeros in place of weights, as a power loss can leave them
            weights = next(iter(GPTModule.load_from_checkpoint(last).model.parameters())).detach().numpy().tobytes()
            assert content.count(weights) == 1
            last.write_bytes(content.replace(weights, bytes(len(weights))))
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
