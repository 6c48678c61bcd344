"""Batch norm over two processes must be batch norm over their batches put together."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gptexp.models.norms import BatchNorm
from gptexp.models.settings import BatchNormSettings, GPTConfig

N, L, C, BLOCK, STEPS = 4, 5, 6, 7, 2
MASK = torch.arange(L) < torch.tensor([[4], [4], [3], [2]])
# statistics, masked, sequences on rank 0. With the uneven split, an average of the ranks' means is not the mean.
CASES = [(stats, masked, first) for stats in ("batch,time", "batch") for masked in (False, True) for first in (2, 1)]


def steps(stats: str, masked: bool, rows: slice) -> dict[str, Tensor]:
    """Train on these rows of each batch for some steps; what came out and what was learned, in the last one."""
    norm = BatchNorm(BatchNormSettings(stats=stats.split(",")), GPTConfig(n_embd=C, block_size=BLOCK)).double()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2.0, C))
        norm.bias.copy_(torch.linspace(-1.0, 1.0, C))
    mask = MASK[rows] if masked else None
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        x, g = (torch.randn(N, L, C, dtype=torch.float64, generator=generator) * 2 + 1 for _ in range(2))
        x, g = x[rows].clone().requires_grad_(), g[rows]
        norm.zero_grad()
        y = norm(x, mask)
        keep = MASK[rows] if masked else torch.ones(x.shape[:2], dtype=torch.bool)
        (y[keep] * g[keep]).sum().backward()
    y = y.detach() * keep.unsqueeze(-1)
    return {"y": y, "x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad,
            "mean": norm.running_mean, "var": norm.running_var}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    results = []
    for stats, masked, first in CASES:
        results.append(steps(stats, masked, slice(first) if rank == 0 else slice(first, N)))
    error = ""
    try:  # one sequence in all: rank 0 has none that counts
        norm = BatchNorm(BatchNormSettings(stats=["batch"]), GPTConfig(n_embd=C, block_size=BLOCK))
        norm(torch.randn(1, L, C), torch.full((1, L), rank == 1))
    except ValueError as e:
        error = str(e)
    torch.save({"results": results, "error": error}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_processes_are_as_one(ranks: list[dict], case: tuple[str, bool, int]) -> None:
    stats, masked, _ = case
    first, second = (rank["results"][CASES.index(case)] for rank in ranks)
    whole = steps(stats, masked, slice(None))
    for key in ("y", "x"):  # each rank has its rows
        torch.testing.assert_close(torch.cat([first[key], second[key]]), whole[key])
    for key in ("weight", "bias"):  # each rank has its rows' share of the sum
        torch.testing.assert_close(first[key] + second[key], whole[key])
        assert not torch.allclose(first[key], whole[key])
    for key in ("mean", "var"):  # every rank has the global batch's
        torch.testing.assert_close(first[key], whole[key])
        assert torch.equal(first[key], second[key])


def test_too_few_sequences_in_all_is_an_error_on_every_rank(ranks: list[dict]) -> None:
    assert all("fewer than two sequences" in rank["error"] for rank in ranks)
