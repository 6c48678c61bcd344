"""Batch norm, with and without penalty: its formula, torch's own layer, and padding, which must leave no trace."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptexp.models.batchnorms import BatchNorm
from gptexp.models.norms import build_norm
from gptexp.models.registry import NORMS, NormShape

N, L, C, BLOCK = 4, 5, 6, 7
BATCH_TIME, BATCH = ["batch", "time"], ["batch"]
both_stats = pytest.mark.parametrize("stats", [BATCH_TIME, BATCH], ids=["batch-time", "batch"])
both_norms = pytest.mark.parametrize("name", ["batchnorm", "rbn"])
# Every position is reached by two sequences or more, except the last one, which none reaches.
MASK = torch.arange(L) < torch.tensor([[4], [4], [3], [2]])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1


def batchnorm(stats: list[str], eps: float = 1e-5, momentum: float = 0.1, name: str = "batchnorm") -> BatchNorm:
    norm = build_norm(name, NORMS[name].settings(eps, momentum, stats), NormShape(C, BLOCK)).double()
    with torch.no_grad():
        norm.weight.copy_(random(C, seed=11))
        norm.bias.copy_(random(C, seed=12))
    return norm.train()


def run(norm: nn.Module, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Outputs and gradients at the real positions (a padded one has no loss), the input's gradient everywhere."""
    x = x.clone().requires_grad_()
    norm.zero_grad()
    y = norm(x, mask)
    keep = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    (y[keep] * random(*y.shape, seed=99)[keep]).sum().backward()
    return {"y": y.detach()[keep], "x.grad": x.grad, "weight.grad": norm.weight.grad.clone(),
            "bias.grad": norm.bias.grad.clone(), "mean": norm.running_mean.clone(), "var": norm.running_var.clone()}


@both_norms
@both_stats
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "all-true mask"])
def test_batchnorm_is_its_formula(name: str, stats: list[str], masked: bool) -> None:
    norm, x = batchnorm(stats, 1e-3, 0.3, name), random(N, L, C)
    y = norm(x, torch.ones(N, L, dtype=torch.bool) if masked else None).detach().numpy()

    a, axes = x.numpy(), ((0, 1) if stats == BATCH_TIME else (0,))
    count = N * L if stats == BATCH_TIME else N
    mean, var = a.mean(axes), a.var(axes)  # numpy's variance is the biased one
    w, b = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    np.testing.assert_allclose(y, (a - mean) / np.sqrt(var + 1e-3) * w + b, rtol=1e-9, atol=1e-12)

    rows = slice(None) if stats == BATCH_TIME else slice(L)  # the positions that this batch has
    np.testing.assert_allclose(norm.running_mean[rows].numpy(), 0.3 * mean, rtol=1e-9)
    np.testing.assert_allclose(norm.running_var[rows].numpy(), 0.7 + 0.3 * var * count / (count - 1), rtol=1e-9)
    if stats == BATCH:
        assert bool((norm.running_mean[L:] == 0).all())
        assert bool((norm.running_var[L:] == 1).all())

    mean, var = norm.running_mean[rows].numpy().copy(), norm.running_var[rows].numpy().copy()
    y = norm.eval()(x).detach().numpy()
    np.testing.assert_allclose(y, (a - mean) / np.sqrt(var + 1e-3) * w + b, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(norm.running_mean[rows].numpy(), mean)  # evaluation learns nothing


class TorchBatchNorm(nn.Module):
    """nn.BatchNorm1d over the same numbers: (N, C, L) for [batch,time], (N, L·C) for [batch]."""

    def __init__(self, ours: BatchNorm) -> None:
        super().__init__()
        self.over_time = not ours.per_position
        self.inner = nn.BatchNorm1d(C if self.over_time else L * C, affine=False).double()
        self.weight, self.bias = nn.Parameter(ours.weight.detach().clone()), nn.Parameter(ours.bias.detach().clone())

    def forward(self, x: Tensor, mask: None = None) -> Tensor:
        if self.over_time:
            y = self.inner(x.transpose(1, 2)).transpose(1, 2)
        else:
            y = self.inner(x.reshape(N, L * C)).view(N, L, C)
        return y * self.weight + self.bias

    @property
    def running_mean(self) -> Tensor:
        return self.inner.running_mean if self.over_time else self.inner.running_mean.view(L, C)

    @property
    def running_var(self) -> Tensor:
        return self.inner.running_var if self.over_time else self.inner.running_var.view(L, C)


@both_norms
@both_stats
@pytest.mark.parametrize("mask", [None, torch.ones(N, L, dtype=torch.bool)], ids=["unmasked", "all-true mask"])
def test_batchnorm_is_torch_batchnorm(name: str, stats: list[str], mask: Tensor | None) -> None:
    ours = batchnorm(stats, name=name)
    theirs = TorchBatchNorm(ours)
    for step in range(4):
        mine, other = run(ours, random(N, L, C, seed=step), mask), run(theirs, random(N, L, C, seed=step))
        if stats == BATCH:
            mine["mean"], mine["var"] = mine["mean"][:L], mine["var"][:L]
        for key, value in other.items():
            torch.testing.assert_close(mine[key], value, msg=lambda text, key=key: f"{key}: {text}")
    x = random(N, L, C, seed=77)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_batchnorm_over_time_is_torch_batchnorm_with_its_own_gain_and_bias() -> None:
    ours, theirs = batchnorm(BATCH_TIME), nn.BatchNorm1d(C).double()
    theirs.load_state_dict(ours.state_dict(), strict=False)  # theirs also counts its batches
    x = random(N, L, C)
    torch.testing.assert_close(ours(x), theirs(x.transpose(1, 2)).transpose(1, 2))


@both_norms
def test_padding_is_as_if_absent_with_statistics_over_batch_and_time(name: str) -> None:
    x, masked, plain = random(N, L, C), batchnorm(BATCH_TIME, name=name), batchnorm(BATCH_TIME, name=name)
    for _ in range(3):
        mine = run(masked, x, MASK)
        x_kept = x[MASK].unsqueeze(1).requires_grad_()  # the real rows alone, (rows, 1, C)
        plain.zero_grad()
        y = plain(x_kept)
        (y.squeeze(1) * random(N, L, C, seed=99)[MASK]).sum().backward()
        torch.testing.assert_close(mine["y"], y.squeeze(1).detach())
        torch.testing.assert_close(mine["x.grad"][MASK], x_kept.grad.squeeze(1))
        torch.testing.assert_close(mine["weight.grad"], plain.weight.grad)
        torch.testing.assert_close(mine["bias.grad"], plain.bias.grad)
        torch.testing.assert_close(mine["mean"], plain.running_mean)
        torch.testing.assert_close(mine["var"], plain.running_var)
    assert bool((mine["x.grad"][~MASK] == 0).all())


@both_norms
def test_padding_is_as_if_absent_with_statistics_over_the_batch(name: str) -> None:
    x, norm = random(N, L, C), batchnorm(BATCH, name=name)
    mean, var = torch.zeros(BLOCK, C, dtype=torch.float64), torch.ones(BLOCK, C, dtype=torch.float64)
    weight, bias = (p.detach().clone().requires_grad_() for p in (norm.weight, norm.bias))
    for _ in range(3):
        mine = run(norm, x, MASK)
        x_all, g = x.clone().requires_grad_(), random(N, L, C, seed=99)
        y, weight.grad, bias.grad = torch.zeros(N, L, C, dtype=torch.float64), None, None
        for t in range(4):  # position by position, over the sequences that reach it; none reaches the fifth
            reach = MASK[:, t]
            y[reach, t] = F.batch_norm(x_all[reach, t], mean[t], var[t], weight, bias, training=True)
        (y * g)[MASK].sum().backward()
        torch.testing.assert_close(mine["y"], y[MASK].detach())
        torch.testing.assert_close(mine["x.grad"], x_all.grad)
        torch.testing.assert_close(mine["weight.grad"], weight.grad)
        torch.testing.assert_close(mine["bias.grad"], bias.grad)
        torch.testing.assert_close(mine["mean"], mean)
        torch.testing.assert_close(mine["var"], var)


@both_norms
def test_a_position_that_no_sequence_reaches_keeps_its_running_statistics(name: str) -> None:
    norm, mask = batchnorm(BATCH, name=name), torch.arange(L) < 3
    norm(random(N, L, C))
    before = norm.running_mean.clone(), norm.running_var.clone()
    norm(random(N, L, C, seed=1), mask.expand(N, L))
    for old, new in zip(before, (norm.running_mean, norm.running_var), strict=True):
        assert torch.equal(new[3:], old[3:])
        assert bool((new[:3] != old[:3]).all())


@both_norms
def test_a_position_that_one_sequence_reaches_is_normalised_as_in_evaluation(name: str) -> None:
    norm, x = batchnorm(BATCH, name=name), random(N, L, C)
    norm.running_mean.copy_(random(BLOCK, C, seed=3))
    norm.running_var.copy_(random(BLOCK, C, seed=4).abs())
    before = norm.running_mean.clone(), norm.running_var.clone()
    expected = norm.eval()(x)[0, 4]
    mask = torch.arange(L) < torch.tensor([[5], [4], [4], [2]])  # the last position is the first sequence's alone
    result = run(norm.train(), x, mask)
    torch.testing.assert_close(norm(x, mask)[0, 4], expected)
    for buffer, old in zip(("mean", "var"), before, strict=True):
        torch.testing.assert_close(result[buffer][4], old[4], rtol=0, atol=0)
        assert not torch.equal(result[buffer][3], old[3])


@both_norms
@both_stats
@pytest.mark.parametrize("content", [0.0, 1e3, 1e300, float("inf"), float("nan")])
def test_the_content_of_padding_changes_nothing(name: str, stats: list[str], content: float) -> None:
    x = random(N, L, C)
    other = x.masked_fill(~MASK.unsqueeze(-1), content)
    mine, changed = run(batchnorm(stats, name=name), x, MASK), run(batchnorm(stats, name=name), other, MASK)
    for key, value in mine.items():
        assert torch.equal(changed[key], value), key


@both_norms
@both_stats
def test_the_mask_matters(name: str, stats: list[str]) -> None:
    x = random(N, L, C)
    assert not torch.allclose(batchnorm(stats, name=name)(x, MASK)[MASK], batchnorm(stats, name=name)(x)[MASK])


@both_norms
@both_stats
def test_a_shorter_batch_uses_the_first_positions(name: str, stats: list[str]) -> None:
    """In evaluation, the first two positions come out the same with and without those that follow."""
    norm, x = batchnorm(stats, name=name), random(N, BLOCK, C)
    norm(x)
    norm.eval()
    torch.testing.assert_close(norm(x[:, :2]), norm(x)[:, :2])


@both_norms
@pytest.mark.parametrize("masked", [False, True])
def test_one_sequence_has_no_variance(name: str, masked: bool) -> None:
    """An error before anything is computed, so that the running statistics stay finite."""
    for stats, shape in ((BATCH, (1, L)), (BATCH_TIME, (1, 1))):
        norm, mask = batchnorm(stats, name=name), torch.ones(shape, dtype=torch.bool) if masked else None
        with pytest.raises(ValueError, match="no variance over fewer than two values: use a larger batch_size"):
            norm(random(*shape, C), mask)
        assert bool((norm.running_mean == 0).all())
        assert bool((norm.running_var == 1).all())
        assert norm.eval()(random(*shape, C), mask).isfinite().all()  # evaluation needs no batch
    assert batchnorm(BATCH_TIME, name=name)(random(1, L, C)).isfinite().all()


@both_norms
@both_stats
def test_running_statistics_are_state_but_not_parameters(name: str, stats: list[str]) -> None:
    norm = batchnorm(stats, name=name)
    assert set(norm.state_dict()) == {"weight", "bias", "running_mean", "running_var"}
    assert {name for name, _ in norm.named_parameters()} == {"weight", "bias"}
