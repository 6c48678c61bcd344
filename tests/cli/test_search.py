"""A search by Optuna: its space, its trials, what pruning does, and how it goes on."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from gptexp.runs.run import Run
from gptexp.sweeps.search import space
from tests.cli.test_interruption import kill, wait_until
from tests.conftest import TINY, failing, finish, spawn

optuna = pytest.importorskip("optuna")

RATES = "optimizer.learning_rate=tag(log,interval(1e-5,1e-1))"
SEARCH = ["hydra/sweeper=optuna", "sweep.name=mine", "hydra.sweeper.n_trials=6", "hydra.sweeper.startup_trials=2"]


@pytest.fixture
def search(command: Callable[..., int], corpus: Path, tmp_path: Path) -> Callable[..., int]:
    def run(*overrides: str) -> int:
        return command("-m", *TINY, f"data.path={corpus}", f"output_dir={tmp_path}", *SEARCH, *overrides)

    return run


def trials(folder: Path):  # type: ignore[no-untyped-def]
    return optuna.load_study(study_name="mine", storage=f"sqlite:///{folder}/sweeps/mine/optuna.db").trials


@pytest.mark.parametrize(("text", "distribution"), [
    ("a=x,y", optuna.distributions.CategoricalDistribution(["x", "y"])),
    ("a=choice(1,2)", optuna.distributions.CategoricalDistribution(["1", "2"])),
    ("a=interval(0.1,1)", optuna.distributions.FloatDistribution(0.1, 1.0)),
    ("a=tag(log,interval(1e-4,1e-2))", optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True)),
    ("a=int(interval(2,8))", optuna.distributions.IntDistribution(2, 8)),
    ("a=range(1,5)", optuna.distributions.IntDistribution(1, 4)),
    ("a=range(0,1,0.25)", optuna.distributions.FloatDistribution(0.0, 0.75, step=0.25)),
    ("a=range(2,9,3)", optuna.distributions.IntDistribution(2, 8, step=3)),
])  # fmt: skip
def test_a_space_in_hydras_words(text: str, distribution: object) -> None:
    assert space([OverridesParser.create().parse_override(text)]) == {"a": distribution}


@pytest.mark.slow
def test_trials_are_runs_and_their_losses_optunas(search: Callable[..., int], tmp_path: Path) -> None:
    assert search(RATES, "norm=layernorm,rmsnorm", "hydra.sweeper.pruner=none") == 0
    known = trials(tmp_path)
    assert [t.state.name for t in known] == ["COMPLETE"] * 6
    for trial in known:
        run = Run.open(tmp_path / "sweeps" / "mine" / f"trial-{trial.number:04d}")
        assert run.result is not None
        assert run.result["best_val_loss"] == trial.value
        assert run.config.optimizer.learning_rate == trial.params["optimizer.learning_rate"]
        assert run.config.model.norm == trial.params["norm"]
    before = (tmp_path / "sweeps" / "mine" / "trial-0000" / "run.json").read_bytes()
    assert search(RATES, "norm=layernorm,rmsnorm", "hydra.sweeper.pruner=none") == 0  # nothing is left to do
    assert len(trials(tmp_path)) == 6
    assert search(RATES, "norm=layernorm,rmsnorm", "hydra.sweeper.pruner=none", "hydra.sweeper.n_trials=7") == 0
    assert len(trials(tmp_path)) == 7
    assert (tmp_path / "sweeps" / "mine" / "trial-0000" / "run.json").read_bytes() == before


@pytest.mark.slow
def test_a_poor_trial_is_pruned_from_within(
    search: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert search("optimizer.learning_rate=choice(3e-3,1e-2,1e-9)", "hydra.sweeper.n_trials=3",
                  "hydra.sweeper.startup_trials=1", "hydra.sweeper.seed=1") == 0  # fmt: skip
    poor = next(t for t in trials(tmp_path) if t.params["optimizer.learning_rate"] == "1e-09")
    assert poor.number > 0
    assert poor.state.name == "PRUNED"
    run = Run.open(tmp_path / "sweeps" / "mine" / f"trial-{poor.number:04d}")
    assert run.info["status"] == "pruned"
    assert run.result is not None
    assert run.result["step"] == 8  # its first evaluation
    assert list(poor.intermediate_values) == [8]
    pruned = sum(t.state.name == "PRUNED" for t in trials(tmp_path))
    saved = pruned * 16 / (3 * 24)  # of 24 steps each
    assert f"pruned: {pruned} of 3 trials, which saved {saved:.0%} of all steps" in capfd.readouterr().out


@pytest.mark.parametrize(("overrides", "told"), [
    (["seed=1"], "there is nothing to search"),
    ([RATES, "hydra.sweeper.sampler=tep"], "hydra.sweeper.sampler=tep: must be one of tpe, random, gp, qmc; did"),
    ([RATES, "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials=0: must be an integer of at least 1"),
    ([RATES, "hydra.sweeper.storage=sqlite:////no/such/folder/a.db"], "cannot be opened"),
    ([RATES, "hydra.sweeper.foo=1"], "hydra.sweeper.foo=1"),
    (["tokenizer=char,byte"], "tokenizer=char,byte: losses per token of different vocabularies cannot be compared"),
    ([RATES, "hardware=ddp_cpu"], "hydra.sweeper.pruner=median: a trial of hardware.strategy=ddp"),
])  # fmt: skip
def test_mistakes(
    overrides: list[str], told: str, search: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    assert search(*overrides) == 2
    err = capfd.readouterr().err
    assert told in err
    assert len(err.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.exhaustive
def test_killed_and_resumed_it_comes_to_the_planned_number(corpus: Path, tmp_path: Path) -> None:
    command = ["-m", *TINY, f"data.path={corpus}", f"output_dir={tmp_path}", *SEARCH, RATES, "hydra.sweeper.n_trials=8"]
    folder = tmp_path / "sweeps" / "mine"
    for wanted in (2, 5):
        process = spawn(*command, cwd=tmp_path)
        wait_until(lambda n=wanted: len(list(folder.glob("trial-*/metrics.csv"))) >= n, process)
        kill(process)
    code, _, err = finish(spawn(*command, cwd=tmp_path))
    assert code == 0, err
    known = trials(tmp_path)
    assert [t.number for t in known] == list(range(8))
    assert {t.state.name for t in known} <= {"COMPLETE", "PRUNED"}
    assert len({json.dumps(t.params) for t in known}) == 8
    assert sorted(p.name for p in folder.glob("trial-*")) == [f"trial-{n:04d}" for n in range(8)]


OVER_NORMS = ["max_steps=4", "eval_interval=2", "hydra.sweeper.pruner=none"]


def test_another_space_is_refused(
    search: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert search(RATES, "hydra.sweeper.n_trials=1", *OVER_NORMS) == 0
    capfd.readouterr()
    assert search("optimizer.learning_rate=interval(1e-5,1e-1)", "norm=layernorm,rmsnorm", *OVER_NORMS) == 2
    assert capfd.readouterr().err.splitlines() == [
        "error: sweep.name=mine: norm=layernorm,rmsnorm differs from the search's norm=(nothing); leave it as it was, "
        "or give the new search another name",
        "error: sweep.name=mine: optimizer.learning_rate=interval(1e-5,1e-1) differs from the search's "
        "optimizer.learning_rate=tag(log,interval(1e-5,1e-1)); leave it as it was, or give the new search another name",
    ]
    assert len(trials(tmp_path)) == 1


@pytest.mark.slow
def test_a_trial_that_was_half_asked_for_is_not_trained(search: Callable[..., int], tmp_path: Path) -> None:
    """What a process leaves that is killed while it asks: a trial without parameters, or one that repeats another."""
    assert search(RATES, "hydra.sweeper.n_trials=1", *OVER_NORMS) == 0
    study = optuna.load_study(study_name="mine", storage=f"sqlite:///{tmp_path}/sweeps/mine/optuna.db")
    study.ask()
    study.enqueue_trial(study.trials[0].params)
    study.ask({"optimizer.learning_rate": study.trials[0].distributions["optimizer.learning_rate"]})
    assert search(RATES, "hydra.sweeper.n_trials=3", *OVER_NORMS) == 0
    states = {t.number: t.state.name for t in trials(tmp_path)}
    assert states == {0: "COMPLETE", 1: "FAIL", 2: "FAIL", 3: "COMPLETE", 4: "COMPLETE"}
    assert sorted(p.name for p in (tmp_path / "sweeps" / "mine").glob("trial-*")) == [
        "trial-0000", "trial-0003", "trial-0004"]  # fmt: skip


@pytest.mark.slow
def test_no_trial_repeats_another(
    search: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of a space that is used up before the wanted number is reached."""
    for _ in range(2):
        assert search("norm=layernorm,rmsnorm", *OVER_NORMS) == 0
        assert "n_trials=6: there are no more than 2 combinations" in capfd.readouterr().out
    assert sorted(t.params["norm"] for t in trials(tmp_path) if t.state.name == "COMPLETE") == ["layernorm", "rmsnorm"]
    assert len(trials(tmp_path)) < 20


@pytest.mark.slow
def test_a_trial_that_is_wrong_stays_a_failure(
    search: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert search("model.n_embd=15,16", *OVER_NORMS) == 1
        out, err = capfd.readouterr()
        assert "model.n_head=2: must divide model.n_embd=15" in out
        assert err == "error: 1 of 2 jobs failed\n"


@pytest.mark.slow
def test_a_failed_trial_is_tried_again_by_the_next_command(
    search: Callable[..., int], tmp_path: Path
) -> None:
    same = [RATES, "hydra.sweeper.n_trials=1", *OVER_NORMS, "sweep.retries=2"]
    with failing() as tried:
        assert [search(*same) for _ in range(2)] == [1, 1]
    assert len(tried) == 2
    assert search(*same) == 0
    (trial,) = trials(tmp_path)
    assert trial.state.name == "COMPLETE"
    with failing() as tried:  # and no more than that
        more = [RATES, "hydra.sweeper.n_trials=2", *OVER_NORMS, "sweep.retries=0"]
        assert [search(*more) for _ in range(2)] == [1, 1]
    assert len(tried) == 1
    assert trials(tmp_path)[1].state.name == "FAIL"
