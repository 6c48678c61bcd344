"""How many threads a run takes: the choice, what is remembered of it, and that a run keeps its number."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gptexp.training.callbacks.recorder import Recorder
from hypothesis import given
from hypothesis import strategies as st

from gptexp.runs import Run
from gptexp.training import threads
from gptexp.training.threads import WORTH, fewest
from tests.conftest import TINY, timeless


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({8: 1.0, 4: 1.9, 2: 3.7, 1: 7.0}, 8),
        ({8: 2.0, 4: 1.0, 2: 1.5, 1: 3.0}, 4),
        ({8: 1.0, 4: 1.0, 2: 1.0, 1: 1.0}, 1),
        ({8: 1.0, 4: 1.02, 2: 1.1, 1: 2.0}, 4),  # twice the threads for 2 % are not worth it
        ({6: 1.5, 3: 1.0, 1: 2.0}, 3),
        ({1: 1.0}, 1),
    ],
)
def test_the_fewest_threads_that_are_about_as_quick(times: dict[int, float], expected: int) -> None:
    assert fewest(max(times), times.__getitem__) == expected


@given(most=st.integers(1, 200), times=st.lists(st.floats(1e-3, 10), min_size=8, max_size=8))
def test_no_other_number_is_much_quicker(most: int, times: list[float]) -> None:
    asked: dict[int, float] = {}

    def seconds(count: int) -> float:
        assert 1 <= count <= most
        assert count not in asked
        asked[count] = times[len(asked) % 8]
        return asked[count]

    chosen = fewest(most, seconds)
    assert {1, most} <= set(asked)
    assert asked[chosen] * WORTH <= min(asked.values())
    assert all(asked[count] * WORTH > min(asked.values()) for count in asked if count < chosen)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache's file of threads, on a machine on which torch would take four."""
    monkeypatch.setenv("GPTEXP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(threads, "OWN", 4)
    yield tmp_path / "cache" / "threads.json"
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def _threads(run: Run) -> int:
    return int(run.info["device"]["threads"])


def test_it_is_measured_once_for_a_size(
    tiny: Callable[..., Run], cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = _threads(tiny("first"))
    assert "measuring how many threads" in capsys.readouterr().out
    ((key, kept),) = json.loads(cache.read_text()).items()
    assert chosen == kept
    assert chosen in (1, 2, 4)

    assert _threads(tiny("again", "norm=rmsnorm", "heads=h4", "placement=post")) == chosen
    assert "measuring" not in capsys.readouterr().out
    assert json.loads(cache.read_text()) == {key: kept}

    cache.write_text(json.dumps({key: 3}))  # it is this that counts
    assert _threads(tiny("three")) == 3
    cache.write_text("{damaged")
    assert _threads(tiny("anew")) in (1, 2, 4)
    assert json.loads(cache.read_text()).keys() == {key}
    tiny("larger", "model.n_layer=2")
    assert len(json.loads(cache.read_text())) == 2


def test_of_two_that_measure_at_once_the_first_counts(
    tiny: Callable[..., Run], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny("probe")
    ((key, _),) = json.loads(cache.read_text()).items()
    cache.unlink()

    def slower(*_: object) -> int:  # another process is done in the meantime
        cache.write_text(json.dumps({key: 3}))
        return 1

    monkeypatch.setattr(threads, "fewest", slower)
    assert _threads(tiny("run")) == 3
    assert json.loads(cache.read_text()) == {key: 3}


def test_a_number_that_is_given_is_taken(tiny: Callable[..., Run], cache: Path) -> None:
    assert _threads(tiny("two", "hardware.threads=2")) == 2
    assert _threads(tiny("own", "hardware.threads=null")) == 4
    assert not cache.exists()


def test_measuring_leaves_the_run_as_it_was(tiny: Callable[..., Run], cache: Path) -> None:
    settings = ["norm=batchnorm", "model.dropout=0.1"]
    measured = tiny("measured", *settings)
    given = tiny("given", *settings, f"hardware.threads={_threads(measured)}")
    assert timeless(measured) == timeless(given)


def test_a_run_that_goes_on_keeps_its_threads(
    tiny: Callable[..., Run], command: Callable[..., int], cache: Path, tmp_path: Path, corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    tiny("probe")
    ((key, _),) = json.loads(cache.read_text()).items()
    cache.write_text(json.dumps({key: 3}))
    tick = Recorder._tick

    def stop(recorder: Recorder, module: Any) -> None:
        tick(recorder, module)
        if recorder._step == 11:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "_tick", stop)
        assert command(*TINY, f"data.path={corpus}", f"hydra.run.dir={tmp_path / 'part'}") == 130
    cache.write_text(json.dumps({key: 1}))
    assert command(f"resume={tmp_path / 'part'}") == 0
    part = Run.open(tmp_path / "part")
    assert _threads(part) == 3
    assert timeless(part) == timeless(tiny("three", "hardware.threads=3"))
