"""Every norm in every placement, from training to the audit, with the verdict that theory demands."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gptexp import sample
from gptexp.config import load_config, read_config
from gptexp.models.influence import measure
from gptexp.models.registry import PLACEMENTS
from gptexp.runs import Run
from gptexp.sample import load_model
from gptexp.training.callbacks.recorder import Recorder
from tests.conftest import timeless
from tests.models.test_causality import VERDICTS

FAST = [("rbn", "sandwich"), ("powernorm", "deepnorm")]
PAIRS = [
    pytest.param(norm, placement, marks=[] if (norm, placement) in FAST else pytest.mark.slow)
    for norm in VERDICTS for placement in PLACEMENTS
]  # fmt: skip


def settings_of(norm: str) -> list[str]:
    """A key of VERDICTS as overrides."""
    tables = VERDICTS[norm][0]
    values = [
        f"model.norms.{name}.{key}={str(value).lower() if isinstance(value, bool) else value}".replace("'", "")
        for name, table in tables.items() for key, value in table.items()
    ]  # fmt: skip
    return [f"norm={norm.partition('[')[0]}", *values]


@pytest.mark.parametrize(("norm", "placement"), PAIRS)
def test_from_training_to_audit(
    norm: str, placement: str, tiny: Callable[..., Run], command: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    wanted = [*settings_of(norm), f"placement={placement}", "max_steps=100", "eval_interval=50", "log_interval=10",
              "checkpoint_interval=30", "model.dropout=0.1", "optimizer.learning_rate=3e-3"]  # fmt: skip
    unbroken = tiny("unbroken", *wanted)
    rows = timeless(unbroken)
    assert rows[-1][0] == "100"
    result = unbroken.result
    assert result is not None
    assert result["best_step"] > 0  # it learned something

    train_row = Recorder._train_row

    def fail(self, trainer, module, step):  # type: ignore[no-untyped-def]
        if step == 70:
            raise RuntimeError("in the middle")
        return train_row(self, trainer, module, step)

    broken = tmp_path / "broken"
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "_train_row", fail)
        with pytest.raises(AssertionError):
            tiny("broken", *wanted)
    assert command(f"resume={broken}") == 0
    assert timeless(Run(broken)) == rows

    capfd.readouterr()
    assert command(f"run={unbroken.path}", "prompt=To be", "max_new_tokens=8", main=sample.main) == 0
    assert capfd.readouterr().out.startswith("To be")

    config = load_config(unbroken.path / "config.yaml")
    assert read_config(config.tree()) == config
    assert (config.model.norm, config.model.placement) == (norm.partition("[")[0], placement)

    _, looks_ahead, couples = VERDICTS[norm]
    model = load_model(unbroken, "last", len(unbroken.info["tokenizer"]["symbols"]))
    ids = torch.randint(model.config.vocab_size, (4, 16), generator=torch.Generator().manual_seed(0))
    train, evaluation = measure(model, ids, training=True).model, measure(model, ids, training=False).model
    assert (train.looks_ahead, train.couples) == (looks_ahead, couples)
    assert (evaluation.looks_ahead, evaluation.couples) == (False, False)
    assert unbroken.info["train_loss"] == {"sees_later_tokens": looks_ahead, "sees_other_sequences": couples}
