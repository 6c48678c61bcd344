"""The store at which the processes of a command meet. Threads stand in for processes: they share nothing but it."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from torch.distributed import HashStore

from gptexp.config.schema import read_config
from gptexp.errors import GroupFailed, UserError
from gptexp.processes.group import Processes, processes
from gptexp.training.hardware import trainer_arguments, world_size

Together = Callable[..., list[Any]]


@pytest.fixture
def together() -> Together:
    """Calls a function in each of several processes with what it sees of them; returns the results, or the errors."""

    def run(work: Callable[[Processes], Any], count: int = 3) -> list[Any]:
        store = HashStore()
        seen = [Processes(LightningEnvironment(), rank, count, started=True, store=store) for rank in range(count)]

        def one(group: Processes) -> Any:
            try:
                return work(group)
            except (Exception, GroupFailed) as error:
                return error

        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(one, seen))

    return run


def test_all_hear_what_the_first_says(together: Together) -> None:
    assert together(lambda group: [group.broadcast(f"{group.rank}{n}") for n in "ab"]) == [["0a", "0b"]] * 3
    assert Processes(LightningEnvironment()).broadcast("x") == "x"


def test_the_others_follow_until_the_first_is_done(together: Together) -> None:
    done: list[tuple[int, int]] = []

    def work(group: Processes) -> int | None:
        def lead() -> int:
            for number in (1, 2):
                group.broadcast(number)
                group.lead(lambda n=number: done.append((0, n)), lambda _: None)  # inside, at once
            return 7

        return group.lead(lead, lambda number: done.append((group.rank, number)))

    assert together(work) == [7, None, None]
    assert sorted(done) == [(rank, number) for rank in range(3) for number in (1, 2)]


def test_different_settings_are_refused_by_the_first(together: Together) -> None:
    assert together(lambda group: group.check_same({"seed": 1, "name": None})) == [None] * 3
    first, *others = together(lambda group: group.check_same({"seed": min(group.rank, 1), "norm": "rmsnorm"}))
    assert type(first) is UserError
    assert first.problems == [
        "seed=1 on rank 1 differs from seed=0 on rank 0; start all processes with the same settings"]
    assert others == [None, None]


def test_the_first_failure_speaks(together: Together) -> None:
    before = threading.Barrier(3)

    def work(group: Processes) -> GroupFailed:
        if group.rank == 1:
            failed = group.fail(2, ["a mistake"])
        before.wait(10)
        if group.rank != 1:
            failed = group.fail(1, ["a consequence"])
        group.leave()
        return failed

    failures = together(work)
    assert [f.mine for f in failures] == [False, True, False]
    assert {(f.status, *f.problems) for f in failures} == {(2, "a mistake")}


def test_a_failure_ends_those_that_wait(together: Together) -> None:
    first, *others = together(lambda group: group.broadcast(1) if group.rank else group.fail(1, ["gone"]))
    assert first.mine
    assert [(type(f), f.mine, f.problems) for f in others] == [(GroupFailed, False, ["gone"])] * 2


ALONE = Processes(LightningEnvironment())


def started(count: int, nodes: int = 1) -> Processes:
    return Processes(LightningEnvironment(), 0, count, nodes, started=True)


def test_the_number_of_started_processes_counts() -> None:
    config = read_config({"hardware": {"devices": 2, "strategy": "ddp", "num_nodes": 7}, "batch_size": 12})
    assert world_size(config, started(3)) == 3
    arguments = trainer_arguments(config, started(6, nodes=2))
    assert (arguments["devices"], arguments["num_nodes"]) == (3, 2)
    with pytest.raises(UserError, match=r"batch_size=12: must be a multiple of 5 processes \* gradient_acc"):
        world_size(read_config({}), started(5))


@pytest.mark.parametrize(("strategy", "processes"), [("auto", started(2)), ("ddp", ALONE)])
def test_several_processes_or_the_setting_mean_ddp(strategy: str, processes: Processes) -> None:
    arguments = trainer_arguments(read_config({"hardware": {"strategy": strategy}}), processes)
    assert type(arguments["strategy"]).__name__ == "DDPStrategy"


def test_more_than_there_are_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setitem(os.environ, "CUBLAS_WORKSPACE_CONFIG", "")
    every, three = (read_config({"hardware": {"accelerator": "gpu", "strategy": "ddp", "devices": devices}})
                    for devices in ("auto", 3))  # fmt: skip
    assert world_size(every, ALONE) == 2
    with pytest.raises(UserError, match="4 processes on a machine with 2 GPUs; start one for each"):
        world_size(every, started(4))
    with pytest.raises(UserError, match=r"hardware\.devices=3: this machine has 2"):
        world_size(three, ALONE)


def test_as_many_on_each_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("RANK", "2"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "3"),
                        ("LOCAL_WORLD_SIZE", "2")):  # fmt: skip
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="3 processes: start the same number on each machine"):
        processes()
    monkeypatch.setenv("WORLD_SIZE", "4")
    found = processes()
    assert isinstance(found.environment, TorchElasticEnvironment)
    assert (found.rank, found.world_size, found.nodes, found.per_node) == (2, 4, 2, 2)
    monkeypatch.undo()
    assert processes().first  # and Lightning's messages are this process's again
