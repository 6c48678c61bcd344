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

from gptexp.config import read_config
from gptexp.errors import GroupFailed, UserError
from gptexp.training.hardware import trainer_arguments, world_size
from gptexp.training.processes import Processes, processes


@pytest.fixture
def together() -> Callable[..., list[Any]]:
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


class TestTelling:
    def test_all_hear_what_the_first_says(self, together: Callable[..., list[Any]]) -> None:
        assert together(lambda group: [group.tell(f"{group.rank}{n}") for n in "ab"]) == [["0a", "0b"]] * 3

    def test_one_process_hears_itself(self) -> None:
        assert Processes(LightningEnvironment()).tell("x") == "x"

    def test_the_others_follow_until_the_first_is_done(self, together: Callable[..., list[Any]]) -> None:
        done: list[tuple[int, int]] = []

        def work(group: Processes) -> int | None:
            def lead() -> int:
                for number in (1, 2):
                    group.tell(number)
                    group.lead(lambda n=number: done.append((0, n)), lambda _: None)  # inside, at once
                return 7

            return group.lead(lead, lambda number: done.append((group.rank, number)))

        assert together(work) == [7, None, None]
        assert sorted(done) == [(rank, number) for rank in range(3) for number in (1, 2)]


class TestSettings:
    def test_the_same(self, together: Callable[..., list[Any]]) -> None:
        assert together(lambda group: group.check_same({"seed": 1, "name": None})) == [None] * 3

    def test_different_ones_are_refused_by_the_first(self, together: Callable[..., list[Any]]) -> None:
        first, *others = together(lambda group: group.check_same({"seed": min(group.rank, 1), "norm": "rmsnorm"}))
        assert type(first) is UserError
        assert first.problems == [
            "seed=1 on rank 1 differs from seed=0 on rank 0; start all processes with the same settings"]
        assert others == [None, None]


class TestFailures:
    def test_the_first_one_speaks(self, together: Callable[..., list[Any]]) -> None:
        before = threading.Barrier(3)

        def work(group: Processes) -> GroupFailed:
            if group.rank == 1:
                failed = group.fail(2, ["a mistake"])
            before.wait(10)
            if group.rank != 1:
                failed = group.fail(1, ["a consequence"])
            group.part()
            return failed

        failures = together(work)
        assert [f.mine for f in failures] == [False, True, False]
        assert {(f.status, *f.problems) for f in failures} == {(2, "a mistake")}

    def test_it_ends_those_that_wait(self, together: Callable[..., list[Any]]) -> None:
        first, *others = together(lambda group: group.tell(1) if group.rank else group.fail(1, ["gone"]))
        assert first.mine
        assert [(type(f), f.mine, f.problems) for f in others] == [(GroupFailed, False, ["gone"])] * 2


def started(count: int, nodes: int = 1) -> Processes:
    return Processes(LightningEnvironment(), 0, count, nodes, started=True)


class TestTheirNumber:
    def test_that_of_torchrun_counts(self) -> None:
        config = read_config({"hardware": {"devices": 2, "strategy": "ddp", "num_nodes": 7}, "batch_size": 12})
        assert world_size(config, started(3)) == 3
        arguments = trainer_arguments(config, started(6, nodes=2))
        assert (arguments["devices"], arguments["num_nodes"]) == (3, 2)

    def test_several_mean_ddp(self) -> None:
        strategy = trainer_arguments(read_config({}), started(2))["strategy"]
        assert type(strategy).__name__ == "DDPStrategy"

    def test_one_device_has_the_strategy_that_is_asked_for(self) -> None:
        config = read_config({"hardware": {"strategy": "ddp"}})
        assert type(trainer_arguments(config, Processes(LightningEnvironment()))["strategy"]).__name__ == "DDPStrategy"

    def test_the_batch_is_shared_among_them(self) -> None:
        with pytest.raises(UserError, match=r"batch_size=12: must be a multiple of 5 processes \* gradient_acc"):
            world_size(read_config({}), started(5))

    def test_more_than_there_are_devices(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setitem(os.environ, "CUBLAS_WORKSPACE_CONFIG", "")
        config = read_config({"hardware": {"accelerator": "gpu", "strategy": "ddp", "devices": "auto"}})
        assert world_size(config, Processes(LightningEnvironment())) == 2
        with pytest.raises(UserError, match="4 processes on a machine with 2 GPUs; start one for each"):
            world_size(config, started(4))
        with pytest.raises(UserError, match=r"hardware\.devices=3: this machine has 2"):
            world_size(read_config({"hardware": {"accelerator": "gpu", "strategy": "ddp", "devices": 3}}),
                       Processes(LightningEnvironment()))  # fmt: skip

    def test_as_many_on_each_machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_patience_changes_no_result() -> None:
    assert read_config({"hardware": {"timeout": 5}}).fingerprint() == read_config({}).fingerprint()
