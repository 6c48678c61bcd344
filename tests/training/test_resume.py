"""A run that fails halfway and goes on, to the bit, with each setting that changes from step to step."""

from collections.abc import Callable

import pytest

from gptexp.processes.group import processes
from gptexp.runs.run import Run
from gptexp.training.launch import start
from tests.conftest import failing, timeless


@pytest.mark.parametrize("override", [
    "schedule.weight_decay_ratio=0.2", "optimizer=muon optimizer.weight_decay=0.1 schedule.weight_decay_ratio=0",
    "batch_warmup_steps=20", "tokenizer=bpe data.vocab_size=300", "callbacks=ema",
])  # fmt: skip
def test_to_the_bit(override: str, tiny: Callable[..., Run]) -> None:
    whole = tiny("whole", *override.split())
    with failing(13), pytest.raises(Exception, match="in the middle"):
        tiny("broken", *override.split())
    broken = Run.open(whole.path.parent / "broken")
    start(broken, processes())
    assert timeless(broken) == timeless(whole)
    plain = tiny("plain")
    assert timeless(plain) != timeless(whole)
