"""What the hardware settings mean on a machine: the number of threads."""

import signal
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptexp.config.schema import Config, read_config
from gptexp.models.settings import build_model
from gptexp.runs.run import Run
from gptexp.training import hardware
from gptexp.training.hardware import FLOPS_PER_THREAD, cpu_limit, peak_flops, thread_count, useful_threads
from tests.cli.test_interruption import begin, wait_for_rows
from tests.conftest import finish, spawn

FLOPS = st.floats(0, 1e15)


@pytest.mark.parametrize(
    ("work", "cores", "expected"),
    [(0, 1, 1), (0, 2, 2), (0, 128, 2), (1, 64, 2), (4.5, 64, 4), (4.5, 3, 3), (1000, 64, 64), (1000, 1, 1), (0, 0, 1)],
)
def test_threads_follow_the_work_of_a_step(work: float, cores: int, expected: int) -> None:
    assert useful_threads(work * FLOPS_PER_THREAD, cores) == expected


@given(less=FLOPS, more=FLOPS, few=st.integers(1, 128), many=st.integers(1, 128))
def test_more_work_or_cores_never_mean_fewer_threads(less: float, more: float, few: int, many: int) -> None:
    (less, more), (few, many) = sorted((less, more)), sorted((few, many))
    assert 1 <= useful_threads(less, few) <= few
    assert useful_threads(less, few) <= useful_threads(more, few)
    assert useful_threads(less, few) <= useful_threads(less, many)
    assert useful_threads(less, few) >= min(few, 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("200000 100000\n", 2), ("150000 100000\n", 2), ("50000 100000\n", 1), ("max 100000\n", None), ("", None)],
)
def test_a_containers_limit_is_read(text: str, expected: int | None, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert cpu_limit(tmp_path / "cpu.max") == expected
    assert cpu_limit(tmp_path / "missing") is None


def _config(**settings: object) -> Config:
    return read_config({"hardware": {"accelerator": "cpu", **settings}, "model": {"n_layer": 1, "n_embd": 16}})


def test_the_settings_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "TORCH_THREADS", 8)
    monkeypatch.setattr(hardware, "FLOPS_PER_THREAD", 1.0)  # work for any number of threads
    monkeypatch.setattr(hardware, "cpu_limit", lambda: None)
    model = build_model(_config().sized(65), 1)
    assert thread_count(model, _config(), 1) == 8
    assert thread_count(model, _config(), 3) == 2  # processes share the cores
    assert thread_count(model, _config(threads=None), 2) == 8
    assert thread_count(model, _config(threads=3), 2) == 3
    assert thread_count(model, _config(), 1, before=5) == 5  # a resumed run keeps its number
    assert thread_count(model, _config(threads=3), 1, before=5) == 3
    monkeypatch.setattr(hardware, "cpu_limit", lambda: 4)
    assert thread_count(model, _config(), 1) == 4


def test_work_is_that_of_a_micro_batch_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "TORCH_THREADS", 128)
    monkeypatch.setattr(hardware, "cpu_limit", lambda: None)
    tree = {"hardware": {"accelerator": "cpu"}, "model": {"n_layer": 1, "n_embd": 16, "block_size": 32}}
    whole, cut = (read_config(tree | {"batch_size": 64, "gradient_accumulation_steps": n}) for n in (1, 4))
    model = build_model(whole.sized(65), 1)
    monkeypatch.setattr(hardware, "FLOPS_PER_THREAD", model.flops_per_token() * 32 * 64 / 40)
    assert thread_count(model, whole, 1) == 40
    assert thread_count(model, cut, 1) == thread_count(model, whole, 4) == 10


def test_the_peak_is_that_of_as_many_threads_as_compute() -> None:
    """However many there are while it is timed: on a busy machine they would wait for each other."""
    peaks = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        peaks.append(peak_flops(_config(), 3))
        assert torch.get_num_threads() == threads
    assert peaks[1] == 2 * peaks[0] > 3e8


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_run_that_goes_on_keeps_its_threads(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    process = begin(corpus, tmp_path / "run")
    wait_for_rows(tmp_path / "run", 8, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    run = Run.open(tmp_path / "run")
    assert run.info["device"]["threads"] == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as on a machine of one core
    assert finish(spawn(f"resume={run.path}", cwd=tmp_path))[0] == 0
    assert run.info["device"]["threads"] == 2
    assert run.info["status"] == "done"
