"""A norm with batch statistics over two processes must be that norm over their batches put together."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gptexp.models.batchnorms import BatchNorm
from gptexp.models.norms import build_norm
from gptexp.models.registry import NORMS, BatchNormSettings, NormShape

N, L, C, BLOCK, STEPS = 4, 5, 6, 7, 3
MASK = torch.arange(L) < torch.tensor([[4], [4], [3], [2]])
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("batchnorm", {"stats": ["batch", "time"]}),
    ("batchnorm", {"stats": ["batch"]}),
    ("rbn", {"stats": ["batch", "time"]}),
    ("rbn", {"stats": ["batch"]}),
    ("causal_batchnorm", {}),
    ("powernorm", {"stats": "running"}),
    ("powernorm", {"stats": "batch"}),
]
# norm, settings, masked, sequences on rank 0. With the uneven split, an average of the ranks' means is not the mean.
CASES = [(*variant, masked, first) for variant in VARIANTS for masked in (False, True) for first in (2, 1)]


def steps(name: str, options: dict[str, Any], masked: bool, rows: slice) -> dict[str, dict[str, Tensor]]:
    """Train on these rows of each batch for some steps; what came out and what was learned, in the last one."""
    norm = build_norm(name, NORMS[name].settings(**options), NormShape(C, BLOCK)).double()
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
        loss, same = (y[keep] * g[keep]).sum(), {}
        if name == "rbn":  # every rank has the penalty of the global batch, so each takes its share
            loss = loss + norm.penalty / (dist.get_world_size() if dist.is_initialized() else 1)
            same = {"penalty": norm.penalty.detach()}
        loss.backward()
    rows_of = {"y": y.detach() * keep.unsqueeze(-1), "x": x.grad}
    shares_of = {"weight": norm.weight.grad, "bias": norm.bias.grad}
    return {"rows": rows_of, "shares": shares_of, "same": {**same, **dict(norm.named_buffers())}}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    results = []
    for name, options, masked, first in CASES:
        results.append(steps(name, options, masked, slice(first) if rank == 0 else slice(first, N)))
    error = ""
    try:  # one sequence in all: rank 0 has none that counts
        norm = BatchNorm(BatchNormSettings(stats=["batch"]), NormShape(C, BLOCK))
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
def test_two_processes_are_as_one(ranks: list[dict], case: tuple[str, dict, bool, int]) -> None:
    name, options, masked, _ = case
    first, second = (rank["results"][CASES.index(case)] for rank in ranks)
    whole = steps(name, options, masked, slice(None))
    for key, value in whole["rows"].items():  # each rank has its rows
        torch.testing.assert_close(torch.cat([first["rows"][key], second["rows"][key]]), value)
    for key, value in whole["shares"].items():  # each rank has its rows' share of the sum
        torch.testing.assert_close(first["shares"][key] + second["shares"][key], value)
        assert not torch.allclose(first["shares"][key], value)
    buffers = {"running_psi", "running_nu"} if name == "powernorm" else {"running_mean", "running_var"}
    assert set(whole["same"]) == buffers | ({"penalty"} if name == "rbn" else set())
    for key, value in whole["same"].items():  # every rank has the global batch's
        torch.testing.assert_close(first["same"][key], value)
        assert torch.equal(first["same"][key], second["same"][key])


def test_too_few_sequences_in_all_is_an_error_on_every_rank(ranks: list[dict]) -> None:
    assert all("fewer than two values" in rank["error"] for rank in ranks)
