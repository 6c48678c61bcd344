"""How many CPU threads a training step is quickest with: measured once for each size of model on each machine."""

import copy
import json
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from gptexp.config import Config
from gptexp.data.cache import cache_folder, locked, replacing
from gptexp.models.language_model import LanguageModel
from gptexp.training.hardware import accelerator, processor
from gptexp.training.kernels import prepare_kernels
from gptexp.training.metrics import summed_loss

log = logging.getLogger("gptexp")

WORTH = 0.97
"""More threads must bring a step below this part of its time: they are taken from other work on the machine."""


OWN = torch.get_num_threads()
"""Torch's choice, before a run of this process had another."""


def thread_count(model: LanguageModel, config: Config, devices: int, before: int | None = None) -> int:
    """The number of threads that the settings mean.

    Args:
        model: to be trained.
        config: the run's.
        devices: number of processes.
        before: what the run had before it was stopped, since its last digits depend on it.
    """
    threads = config.hardware.threads
    if threads != "auto" or devices > 1 or accelerator(config.hardware) != "cpu":
        return threads if isinstance(threads, int) else OWN
    return before or quickest_threads(model, config)


def quickest_threads(model: LanguageModel, config: Config) -> int:
    """The number of threads for a training step of a model of this size; at most torch's own choice.

    What was measured is kept in the cache folder, by the number of operations: norms, placements and heads that are to
    be compared have the same number. Of two threads or one nothing is measured: on two cores, none of eight sizes of
    model was slower with two.

    Args:
        model: as it will be trained; neither its weights nor any random state changes.
        config: the run's.
    """
    if OWN <= 2:
        return OWN
    rows = config.batch_size // config.gradient_accumulation_steps
    work = [round(model.flops_per_token()), rows, model.config.block_size]
    key = json.dumps([processor(), OWN, torch.__version__, prepare_kernels(config.hardware.fast_mkl), *work])
    path = cache_folder() / "threads.json"
    known = _known(path)
    if key not in known:
        log.info("measuring how many threads are quickest for a model of this size, once on this machine")
        known[key] = fewest(OWN, _timer(model, rows))
        with suppress(OSError), locked(path), replacing(path) as file:
            known |= _known(path)  # of two that measured at once, the first counts for both
            file.write(json.dumps(known, indent=1).encode())
    return known[key]


def fewest(most: int, seconds: Callable[[int], float]) -> int:
    """The fewest of `most`, its half, its quarter .. 1 threads that are about as quick as the quickest.

    Args:
        most: the greatest number.
        seconds: the time of a step with so many threads.
    """
    counts = [most]
    while counts[-1] > 1:
        counts.append(counts[-1] // 2)
    times = {count: seconds(count) for count in reversed(counts)}
    return next(count for count, taken in times.items() if taken * WORTH <= min(times.values()))


def _known(path: Path) -> dict[str, int]:
    try:
        found = json.loads(path.read_text())
        return {str(k): int(v) for k, v in found.items() if int(v) > 0}
    except (OSError, ValueError, AttributeError, TypeError):  # none yet, or damaged
        return {}


def _timer(model: LanguageModel, rows: int) -> Callable[[int], float]:
    twin = copy.deepcopy(model).train()
    ids = torch.arange(rows * model.config.block_size).view(rows, -1) % model.config.vocab_size

    def step() -> float:
        start = time.perf_counter()
        summed_loss(twin(ids), ids).backward()  # type: ignore[no-untyped-call]
        return time.perf_counter() - start

    def seconds(count: int) -> float:
        torch.set_num_threads(count)
        with torch.random.fork_rng(devices=[]):
            step()
            return min(step() for _ in range(5))

    return seconds
