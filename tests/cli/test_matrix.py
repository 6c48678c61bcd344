"""Every norm in every placement, from training to the audit, with the verdict that theory demands."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptexp import sample
from gptexp.audits.influence import measure
from gptexp.config.command_line import compose_config
from gptexp.config.schema import load_config, read_config
from gptexp.errors import RunFailed
from gptexp.processes.group import processes
from gptexp.runs.run import Run
from gptexp.training.launch import start
from gptexp.training.load import load_model
from tests.conftest import TINY, failing, more, timeless, train
from tests.models.conftest import PAIRS as ALL
from tests.models.conftest import VERDICTS, norm_settings

FAST = [("rbn", "sandwich"), ("powernorm", "deepnorm")]
PAIRS = [
    pair if pair in FAST else pytest.param(*pair, marks=pytest.mark.slow) if i % 5 == 0 else more(*pair)
    for i, pair in enumerate(ALL)  # each norm and each placement among the slow ones
]


@pytest.fixture(scope="module")
def base(corpus: Path) -> dict[str, Any]:
    """The settings that all pairs share, composed once: what a command line makes of norms is tested elsewhere."""
    return compose_config(
        [*TINY, f"data.path={corpus}", "max_steps=100", "eval_interval=50", "log_interval=10", "checkpoint_interval=30",
         "model.dropout=0.1", "optimizer.learning_rate=3e-3"]
    ).tree()  # fmt: skip


@pytest.mark.parametrize(("norm", "placement"), PAIRS)
def test_from_training_to_audit(
    norm: str, placement: str, base: dict[str, Any], command: Callable[..., int],
    capfd: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    looks_ahead, couples = VERDICTS.get(norm, (False, False))
    name, norms = norm_settings(norm)
    changed = {"norm": name, "placement": placement, "norms": norms}
    config = read_config(base | {"model": base["model"] | changed})
    train(config, tmp_path / "unbroken")
    unbroken = Run.open(tmp_path / "unbroken")
    rows = timeless(unbroken)
    assert rows[-1][0] == "100"
    result = unbroken.result
    assert result is not None
    assert result["best_step"] > 0  # it learned something

    with failing(70), pytest.raises(RunFailed, match="in the middle"):
        train(config, tmp_path / "broken")
    broken = Run.open(tmp_path / "broken")
    start(broken, processes())
    assert timeless(broken) == rows

    capfd.readouterr()
    assert command(f"run={unbroken.path}", "prompt=To be", "max_new_tokens=8", main=sample.main) == 0
    assert capfd.readouterr().out.startswith("To be")

    assert load_config(unbroken.path / "config.yaml") == config

    model = load_model(unbroken, "last", len(unbroken.info["tokenizer"]["symbols"]))
    ids = torch.randint(model.config.vocab_size, (4, 16), generator=torch.Generator().manual_seed(0))
    training, evaluation = measure(model, ids, training=True).model, measure(model, ids, training=False).model
    assert (training.looks_ahead, training.couples) == (looks_ahead, couples)
    assert (evaluation.looks_ahead, evaluation.couples) == (False, False)
    assert unbroken.info["train_loss"] == {"sees_later_tokens": looks_ahead, "sees_other_sequences": couples}
