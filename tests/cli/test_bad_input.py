"""Every mistake: one clear line on standard error, status 2, no traceback, nothing written, torch not even loaded."""

import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import hydra
import pytest
import yaml

import gptexp
from gptexp import audit, compare, sample
from gptexp.runs.run import Run
from gptexp.training.module import GPTModule
from tests.conftest import REPOSITORY, TINY

WRONG: dict[str, list[str]] = {
    "model.norm=rmsnrom model.placement=mid model.n_embd=-16 model.n_layer=two model.dropout=1 "
    "optimizer.learning_rate=nan optimizer.momentum=0.9 schedule.decay_fraction=0.5 "
    "model.norms.rmsnorm.epsilon=0.1 model.norms.rmsnorm.momentum=0.1 "
    "data.val_fraction=1.5 max_steps=0 log_interval=2.5 eval_interval=true "
    "hardware.precision=fp8 hardware.compile=graph hardware.threads=0 hardware.fast_mkl=2": [
        "model.norm=rmsnrom: must be one of batchnorm, causal_batchnorm, derf, dyt, groupnorm, layernorm, ",
        "model.placement=mid: must be one of deepnorm, dual, hybrid, mixln, output, post, pre, sandwich",
        "model.n_embd=-16: must be an integer of at least 1",
        "model.n_layer=two: must be an integer of at least 0",
        "model.dropout=1: must be a number of at least 0 and less than 1",
        "optimizer.learning_rate=NaN: must be a number greater than 0",
        "optimizer.momentum=0.9: unknown key of optimizer.name=adamw",
        "schedule.decay_fraction=0.5: unknown key of schedule.name=cosine",
        "model.norms.rmsnorm.epsilon=0.1: unknown key; did you mean eps?",
        "model.norms.rmsnorm.momentum=0.1: unknown key; allowed: eps",
        "data.val_fraction=1.5: must be a number greater than 0 and less than 1",
        "max_steps=0: must be an integer of at least 1",
        "log_interval=2.5: must be an integer of at least 1",
        "eval_interval=true: must be an integer of at least 1",
        "hardware.precision=fp8: must be one of auto, 32-true",
        "hardware.compile=graph: must be true or false or graphs",
        "hardware.threads=0: must be an integer of at least 1 or auto or null",
        "hardware.fast_mkl=2: must be true or false"],
    # The words of other programs, and of other places.
    "model.nrom=rmsnorm n_head=8 bathc_size=8 lr=3e-4 optimizer.lr=1e-3 epochs=3 wandb=false bs=8 d_model=64 "
    "optimiser=muon device=cuda model.ema=0.99 data.documents=true precision=bf16 callbacks.mine.patience=3 "
    "entity=me model.vocab_size=9": [
        "model.nrom=rmsnorm: unknown key; did you mean model.norm?",
        "n_head=8: unknown key; did you mean model.n_head?",
        "bathc_size=8: unknown key; did you mean batch_size?",
        "lr=3e-4: unknown key; did you mean optimizer.learning_rate?",
        "optimizer.lr=1e-3: unknown key; did you mean optimizer.learning_rate?",
        "epochs=3: unknown key; did you mean max_steps, the length of training in optimizer steps?",
        "wandb=false: unknown key; did you mean logger=wandb, logger=none or logger.wandb.mode=offline?",
        "bs=8: unknown key; did you mean batch_size?",
        "d_model=64: unknown key; did you mean model.n_embd?",
        "optimiser=muon: unknown key; did you mean optimizer=muon?",
        "device=cuda: unknown key; did you mean hardware=gpu?",
        "model.ema=0.99: unknown key; did you mean callbacks=ema?",
        "data.documents=true: unknown key; did you mean task=documents?",
        "precision=bf16: unknown key; did you mean hardware.precision?",
        "callbacks.mine.patience=3: unknown key; to add it, write +callbacks.mine.patience=3",
        "entity=me: unknown key; did you mean logger.wandb.entity?",
        "model.vocab_size=9: unknown key; did you mean data.vocab_size?"],
    "norm=rmsnrom heads=3 placement=mid hardware=cuda data=notes.txt experiment=nanogpt model=lecture": [
        "norm=rmsnrom: unknown; did you mean rmsnorm? allowed: batchnorm, causal_batchnorm, derf, ",
        "heads=3: unknown; did you mean model.n_head=3? allowed: h1, ",
        "placement=mid: unknown; allowed: deepnorm, ",
        "hardware=cuda: unknown; did you mean gpu? allowed: auto, cpu, ddp, ",
        "data=notes.txt: unknown; did you mean data=file data.path=notes.txt? allowed: file, ",
        "experiment=nanogpt: unknown; did you mean nanogpt_gpu? allowed: adder, adder_small, ",
        "model=lecture: unknown; did you mean experiment=lecture? allowed: bigram, counts, "],
    "norm=batch placement=pre_norm experiment=known/rmsnorm": [
        "norm=batch: unknown; did you mean batchnorm? allowed: ",
        "placement=pre_norm: unknown; did you mean pre? allowed: ",
        "experiment=known/rmsnorm: unknown; did you mean sweep=known/rmsnorm? allowed: "],
    "norm=RMSNorm heads=8 experiment=null": [
        "norm=RMSNorm: unknown; did you mean rmsnorm? allowed: ",
        "heads=8: unknown; did you mean h8? allowed: h1, ",
        "experiment=null: unknown; allowed: adder, adder_small, "],
    "~norm ~seed logger=null schedule=null": [
        "~norm: cannot be left out; allowed: batchnorm, causal_batchnorm, ",
        "~seed: cannot be left out; write seed=VALUE",
        "logger=null: cannot be left out; allowed: csv, mlflow, none, ",
        "schedule=null: cannot be left out; allowed: constant, cosine, linear, step, wsd"],
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
    "+norm=rmsnorm ++placement=post hydra.verbose=true,false": [
        "+norm=rmsnorm: this group has a choice already; write norm=rmsnorm",
        "++placement=post: this group has a choice already; write placement=post",
        "hydra.verbose=true,false: a setting of Hydra's own has one value"],
    "model.n_head=3": ["model.n_head=3: heads=h2 sets model.n_head, too; leave one of them out",
                       "model.n_head=3: must divide model.n_embd=16; nearest: 1, 2, 4"],
    "model.block_size=10000": ["model.block_size=10000: longer than the training split"],
    "data.path=nowhere.txt hydra.run.dir=run": ["data.path=nowhere.txt: no such file"],
    "data.path=.": ["data.path=.: holds no file that is not empty and ends with .txt, "],
    "gradient_accumulation_steps=3": ["batch_size=4: must be a multiple of hardware.devices=1 * "
                                      "gradient_accumulation_steps=3 = 3"],
    "hardware.compile=graphs": ["hardware.compile=graphs: needs a GPU, not hardware.accelerator=cpu"],
    "hardware=auto hardware.compile=graphs": ["hardware.compile=graphs: this machine has no NVIDIA GPU; allowed"],
    "hardware=ddp hardware.compile=graphs gradient_accumulation_steps=2": [
        "hardware.compile=graphs: needs hardware.strategy=auto, not ddp",
        "hardware.compile=graphs: needs gradient_accumulation_steps=1, not 2"],
    "hardware=gpu": ["hardware.accelerator=gpu: this machine has none; allowed here: cpu"],
    "resume=nowhere": ["resume=nowhere: there is no such directory"],
    "resume=.": ["resume=.: is not a run directory"],
    "norm=groupnorm model.norms.groupnorm.groups=3 placement=deepnorm model.residual=false model.projection=false "
    "model.n_inner=24": [
        "model.norms.groupnorm.groups=3: must divide the 16 channels",
        "model.residual=false: model.placement=deepnorm weighs the residual",
        "model.n_inner=24: must be 0 or model.n_embd=16"],
    "model.norms.batchnorm.stats=[time]": ["model.norms.batchnorm.stats=[time]: must be [batch,time] or [batch]"],
    "model=bigram norm=rmsnorm": [
        f"model.{setting}: unknown key of model.name=bigram"
        for setting in ("norm=rmsnorm", "n_head=2", "n_layer=1", "n_embd=16")],
    "batch_size=1 norm=batchnorm model.norms.batchnorm.stats=[batch]": [
        "batch_size=1: model.norm=batchnorm as it is set needs at least 2 sequences"],
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
    "sweep=known/rmsnorm": ["sweep=known/rmsnorm: needs --multirun (-m)"],
    # The shell's spaces, and dashes.
    "norm = rmsnorm position =rop placement= pre": [
        "norm = rmsnorm: a setting has no spaces; write norm=rmsnorm",
        "position =rop: a setting has no spaces; write position=rop", "position=rop: unknown; did you mean rope?",
        "placement= pre: a setting has no spaces; write placement=pre"],
    "model.norms.batchnorm.stats=[batch, time]": [
        "model.norms.batchnorm.stats=[batch, time]: a setting has no spaces; write model.norms.batchnorm.stats=[batch"],
    "--position=rope --norm rmsnrom --placement": [
        "--position=rope: a setting has no dashes; write position=rope",
        "--norm rmsnrom: a setting has no dashes; write norm=rmsnrom", "norm=rmsnrom: unknown; did you mean rmsnorm?",
        "--placement: unknown option; --hydra-help lists the options, --help the settings"],
    # Hydra's own settings, and its folders.
    "hydra.bogus=1": ["Could not override 'hydra.bogus'. To append to your config use +hydra.bogus=1"],
    "hydra.mode=FOO seed=-1": ["Error merging override hydra.mode=FOO Invalid value 'FOO'", "seed=-1: must be"],
    "hydra.run.dir=/etc/passwd/run": ["hydra.run.dir=/etc/passwd/run: cannot be made (cannot write /etc/passwd)"],
    "output_dir=/etc/passwd": ["output_dir=/etc/passwd: cannot write"],
    "hydra.run.dir=${nowhere}": ["Interpolation key 'nowhere' not found"],
    "+bogus=1": ["bogus=1: unknown key"],
    "logger=wandb logger.wandb.projct=x": ["logger.wandb.projct=x: unknown key; did you mean logger.wandb.project?"],
    "logger=[none,nonsense]": ["logger=nonsense: unknown; did you mean none? allowed: csv, "],
    "model.nrom=x model.n_embd=0 norm=rms bogus optimizer.beta1=2 seed=-1": [
        "bogus: cannot be read", "norm=rms: unknown; did you mean rmsnorm?", "model.nrom=x: unknown key",
        "model.n_embd=0: must be", "optimizer.beta1=2: must be", "seed=-1: must be"],
    # Sweeps.
    "-m norm=layernorm, rmsnorm seed=-1": [
        "norm=layernorm, rmsnorm: a setting has no spaces; write norm=layernorm,rmsnorm", "seed=-1: must be"],
    "-m norm=layernorm,rmsnrom model.n_layer=1,-1 seed=range(0,3)": [
        "norm=rmsnrom: unknown; did you mean", "model.n_layer=-1: must be an integer of at least 0"],
    "-m norm=layernorm,rmsnorm model.norm=batchnorm": [
        "model.norm=batchnorm: norm=layernorm,rmsnorm sets model.norm, too; leave one of them out"],
    "-m sweep=norms norm=rmsnorm": [
        "norm=rmsnorm: model.norm=layernorm,rmsnorm,batchnorm sets model.norm, too; write model.norm=VALUE to choose "],
    "-m norm=glob(zzz*)": ["norm=glob(zzz*): names no choice; allowed: batchnorm, "],
    "-m optimizer.learning_rate=interval(0.1,1)": [
        "optimizer.learning_rate=interval(0.1,1): values without number need a search, hydra/sweeper=optuna"],
    "-m hydra/launcher=jobli hydra.launcher.n_jobs=2 seed=1,-1": [
        "hydra/launcher=jobli: unknown; did you mean joblib? allowed: basic, ", "seed=-1: must be"],
    "-m hydra/sweeper=basic seed=1,2": ["hydra/sweeper=basic: needs sweep.name=NAME, the folder of its jobs"],
    # Run directories.
    "sample nowhere temp=0.5": ["temp=0.5: unknown key; did you mean temperature?"],
    "sample nowhere": ["run=nowhere: there is no such directory"],
    "sample top_k=3": ["run: is missing; give the run directory as run=DIR"],
    "sample a run=b": ["b: cannot be read as a setting; the run directory is a"],
    "audit nowhere checkpoint=last": ["run=nowhere: there is no such directory"],
    "audit nowhere norm=rmsnorm": ["norm=rmsnorm: has no effect with run=nowhere, whose configuration is complete"],
    "audit a b": ["b: cannot be read as a setting; the run directory is a"],
    "audit ~norm": ["~norm: cannot be left out; allowed: batchnorm, "],
    "compare nowhere run=a=b": ["nowhere: there is no such directory", "a=b: there is no such directory"],
    "compare delta=0.1": ["no directory is given; name sweeps or runs, such as outputs/sweeps/norms"],
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_one_line_each(
    wrong: str, command: Callable[..., int], corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    name, *words = wrong.split(" ")
    if module := {"sample": sample, "audit": audit, "compare": compare}.get(name):
        assert command(*words, main=module.main) == 2
    else:
        path = [] if "data.path" in wrong else [f"data.path={corpus}"]
        flags, words = ([name], words) if name == "-m" else ([], [name, *words])
        assert command(*flags, *TINY, *path, *words) == 2
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert len(lines) == len(WRONG[wrong]), err
    for start in WRONG[wrong]:
        assert any(line.startswith(f"error: {start}") for line in lines), err
    assert "Traceback" not in out + err
    assert not list(tmp_path.iterdir()), "a wrong command left something behind"


class TestFlags:
    @pytest.mark.parametrize(("arguments", "told"), [
        (["seed=1,2", "-m", "norm=layernorm,none"], "-m: stands between settings; write it before them: -m seed=1,2"),
        (["-cd", "nowhere"], "--config-dir nowhere: there is no such folder"),
        (["--cfg", "job", "norm=rmsnrom"], "norm=rmsnrom: unknown; did you mean rmsnorm? allowed: "),
        (["--cfg", "job", "sede=3"], "Could not override 'sede'. To append to your config use +sede=3"),
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
        assert "\n  norm=rmsnorm                      y = x / sqrt(mean(x^2) + eps) * weight" in out
        assert "\n  max_steps=2000                    Optimizer steps; null sets " in out
        assert command("--hydra-help") == 0
        assert "--multirun,-m" in capfd.readouterr().out
        assert command("--version") == 0
        assert capfd.readouterr().out == f"gptexp {gptexp.__version__} (Hydra {hydra.__version__})\n"

    def test_hydras_account_of_the_defaults(
        self, command: Callable[..., int], capfd: pytest.CaptureFixture[str]
    ) -> None:
        assert command("--info", "defaults", "norm=rmsnorm") == 0
        assert "| norm/rmsnorm " in capfd.readouterr().out

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
        assert "heads=h55: unknown; did you mean h5? allowed: h1, h12, h12_kv1, " in capfd.readouterr().err


def test_the_package_itself_lists_its_commands() -> None:
    package = [sys.executable, "-m", "gptexp"]
    wrong = subprocess.run([*package, "train", "norm=rmsnorm"], capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "error: train norm=rmsnorm: write python -m gptexp.train norm=rmsnorm\n"
    done = subprocess.run(package, capture_output=True, text=True, check=True)
    listed = {line.split()[2] for line in done.stdout.splitlines() if line.startswith("    python -m gptexp.")}
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    assert listed == {target.partition(":")[0] for target in scripts.values()}


@pytest.mark.parametrize(("content", "message"), [
    (b"", "empty"), (b"ok \xff\xfe", "offset 3"), ("éa".encode("utf-16"), "offset 0"),
])  # fmt: skip
def test_unreadable_text(
    content: bytes, message: str, command: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    assert command(*TINY, f"data.path={tmp_path / 'text.txt'}", f"output_dir={tmp_path / 'out'}") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: data.path={tmp_path / 'text.txt'}: ")
    assert message in line
    assert not (tmp_path / "out").exists()


class TestResume:
    @pytest.fixture
    def refused(self, command: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
        """What a command says that resumes a run and is refused, which leaves the run as it was."""

        def resume(run: Run, *overrides: str) -> list[str]:
            before = run.info["status"], run.metrics_path.read_bytes()
            capfd.readouterr()
            assert command(f"resume={run.path}", *overrides) == 2
            assert (run.info["status"], run.metrics_path.read_bytes()) == before
            return capfd.readouterr().err.splitlines()

        return resume

    def test_a_finished_run(self, finished: Run, refused: Callable[..., list[str]]) -> None:
        (line,) = refused(finished)
        assert "this run is done" in line

    def test_another_configuration(self, finished: Run, refused: Callable[..., list[str]]) -> None:
        finished.update(status="interrupted")
        lines = refused(finished, "model.norm=rmsnorm", "batch_size=8", "model.n_embd=16")
        assert [line.split(": ")[2].split(" ")[0] for line in lines] == ["model.norm=rmsnorm", "batch_size=8"]
        assert "differs from the run's model.norm=layernorm" in lines[0]

    def test_a_group_choice_that_is_the_default(
        self, tiny: Callable[..., Run], refused: Callable[..., list[str]]
    ) -> None:
        run = tiny("run", "norm=rmsnorm")
        run.update(status="interrupted")
        (line,) = refused(run, "norm=layernorm")
        assert "model.norm=layernorm differs from the run's model.norm=rmsnorm" in line

    @pytest.mark.parametrize("damage", ["missing", "foreign", "cut", "hole", "other run"])
    def test_a_bad_checkpoint(
        self, damage: str, finished: Run, tiny: Callable[..., Run], refused: Callable[..., list[str]]
    ) -> None:
        last = finished.checkpoint("last")
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
        finished.update(status="interrupted")
        (line,) = refused(finished)
        assert "last.ckpt" in line


def test_no_lightning_before_a_mistake_is_told(corpus: Path, tmp_path: Path) -> None:
    """What keeps a wrong command quick."""
    code = """
import sys
from gptexp.train import main

common = sys.argv[1:]
for wrong in ("model.n_head=3", "data.path=nowhere.txt", "model.block_size=99999", "resume=nowhere"):
    sys.argv[1:] = [*common, wrong]
    try:
        main()
    except SystemExit as stop:
        print(stop.code, [name for name in ("lightning", "wandb") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code, *TINY, f"data.path={corpus}"], cwd=tmp_path,
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout == 4 * "2 []\n", done.stderr
