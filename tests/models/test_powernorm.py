"""PowerNorm against numpy, its approximate gradient too, which no automatic differentiation gives."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gptexp.models.batchnorms import PowerNorm
from gptexp.models.registry import NormShape, PowerNormSettings

N, L, C = 4, 5, 6
EPS, MOMENTUM = 1e-2, 0.3
MASK = torch.arange(L) < torch.tensor([[5], [4], [3], [0]])
masked = pytest.mark.parametrize("mask", [None, torch.ones(N, L, dtype=torch.bool), MASK], ids=["none", "true", "some"])
prescaled = pytest.mark.parametrize("prescale", [False, True], ids=["plain", "prescale"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1


def powernorm(stats: str = "running", prescale: bool = True) -> PowerNorm:
    """With all of its values away from where they start, but for nu."""
    norm = PowerNorm(PowerNormSettings(EPS, MOMENTUM, stats, prescale), NormShape(C, L)).double()
    with torch.no_grad():
        norm.weight.copy_(random(C, seed=11))
        norm.bias.copy_(random(C, seed=12))
        norm.running_psi.copy_(random(C, seed=13).square() + 0.1)
    return norm.train()


class Algorithm2:
    """Shen et al. 2020, algorithm 2, on rows (B, C), with psi for what is psi squared there, and eps."""

    def __init__(self, norm: PowerNorm) -> None:
        self.weight, self.bias = norm.weight.detach().numpy().copy(), norm.bias.detach().numpy().copy()
        self.psi, self.nu = norm.running_psi.numpy().copy(), norm.running_nu.numpy().copy()

    def forward(self, x: np.ndarray) -> np.ndarray:
        self.scale = 1 / np.sqrt(self.psi + EPS)  # that of the steps before
        self.z = x * self.scale
        self.psi = (1 - MOMENTUM) * self.psi + MOMENTUM * (x**2).mean(0)
        return self.weight * self.z + self.bias

    def backward(self, dy: np.ndarray) -> np.ndarray:
        self.dweight, self.dbias = (dy * self.z).sum(0), dy.sum(0)
        dz = dy * self.weight
        dx = (dz - self.nu * self.z) * self.scale
        gamma, lam = (self.z**2).mean(0), (dz * self.z).mean(0)
        self.nu = self.nu * (1 - MOMENTUM * gamma) + MOMENTUM * lam
        return dx


def unit(x: np.ndarray) -> np.ndarray:
    """Each row over its root mean square."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)


def through_unit(x: np.ndarray, g: np.ndarray) -> np.ndarray:
    """The gradient of sum(unit(x) g)."""
    r = np.sqrt((x**2).mean(-1, keepdims=True) + EPS)
    return g / r - x * (x * g).mean(-1, keepdims=True) / r**3


@masked
@prescaled
def test_three_steps_are_those_of_algorithm_2(prescale: bool, mask: Tensor | None) -> None:
    norm = powernorm(prescale=prescale)
    theirs = Algorithm2(norm)
    keep = torch.ones(N, L, dtype=torch.bool) if mask is None else mask
    for step in range(3):
        x, g = random(N, L, C, seed=step).requires_grad_(), random(N, L, C, seed=50 + step)
        norm.zero_grad()
        y = norm(x, mask)
        (y[keep] * g[keep]).sum().backward()

        rows, dy = x.detach()[keep].numpy(), g[keep].numpy()
        np.testing.assert_allclose(
            y.detach()[keep].numpy(), theirs.forward(unit(rows) if prescale else rows), rtol=1e-9, atol=1e-12
        )
        dx = theirs.backward(dy)
        dx = through_unit(rows, dx) if prescale else dx
        np.testing.assert_allclose(x.grad[keep].numpy(), dx, rtol=1e-8, atol=1e-11)
        assert bool((x.grad[~keep] == 0).all())
        np.testing.assert_allclose(norm.weight.grad.numpy(), theirs.dweight, rtol=1e-9)
        np.testing.assert_allclose(norm.bias.grad.numpy(), theirs.dbias, rtol=1e-9)
        np.testing.assert_allclose(norm.running_psi.numpy(), theirs.psi, rtol=1e-10)
        np.testing.assert_allclose(norm.running_nu.numpy(), theirs.nu, rtol=1e-10)
    assert float(norm.running_nu.abs().min()) > 1e-3


@masked
@prescaled
def test_statistics_of_the_batch_are_differentiated_through(prescale: bool, mask: Tensor | None) -> None:
    """Against automatic differentiation of the formula on the rows that are no padding."""
    norm = powernorm("batch", prescale)
    psi_average = norm.running_psi.clone()
    keep = torch.ones(N, L, dtype=torch.bool) if mask is None else mask
    for step in range(3):
        x, g = random(N, L, C, seed=step).requires_grad_(), random(N, L, C, seed=50 + step)[keep]
        norm.zero_grad()
        y = norm(x, mask)[keep]
        (y * g).sum().backward()

        rows = x.detach()[keep].requires_grad_()
        weight, bias = (p.detach().clone().requires_grad_() for p in (norm.weight, norm.bias))
        unit_rows = rows / torch.sqrt((rows * rows).mean(-1, keepdim=True) + EPS) if prescale else rows
        psi = (unit_rows * unit_rows).sum(0) / len(rows)
        expected = unit_rows / torch.sqrt(psi + EPS) * weight + bias
        (expected * g).sum().backward()
        psi_average = (1 - MOMENTUM) * psi_average + MOMENTUM * psi.detach()

        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(x.grad[keep], rows.grad)
        assert bool((x.grad[~keep] == 0).all())
        torch.testing.assert_close(norm.weight.grad, weight.grad)
        torch.testing.assert_close(norm.bias.grad, bias.grad)
        torch.testing.assert_close(norm.running_psi, psi_average)
        assert bool((norm.running_nu == 0).all())


def test_without_prescale_the_batch_form_is_rms_over_the_batch() -> None:
    """Of unit root mean square in every channel, as nn.RMSNorm over what is here the batch."""
    norm, x = powernorm("batch", prescale=False), random(N, L, C)
    over_batch = nn.RMSNorm(N * L, eps=EPS, elementwise_affine=False)(x.flatten(0, 1).T).T.view_as(x)
    torch.testing.assert_close(norm(x), over_batch * norm.weight + norm.bias)


@pytest.mark.parametrize("stats", ["running", "batch"])
@prescaled
def test_evaluation_uses_the_running_average_and_learns_nothing(stats: str, prescale: bool) -> None:
    norm, x = powernorm(stats, prescale).eval(), random(N, L, C).requires_grad_()
    norm.running_nu.fill_(0.5)  # of no effect here
    state = {name: value.clone() for name, value in norm.state_dict().items()}
    y, g = norm(x, MASK), random(N, L, C, seed=50)
    (y * g).sum().backward()

    rows, dy = x.detach().numpy().reshape(-1, C), g.numpy().reshape(-1, C)
    w, b, psi = (state[name].numpy() for name in ("weight", "bias", "running_psi"))
    expected = (unit(rows) if prescale else rows) / np.sqrt(psi + EPS) * w + b
    np.testing.assert_allclose(y.detach().numpy().reshape(-1, C), expected, rtol=1e-9, atol=1e-12)
    dx = dy * w / np.sqrt(psi + EPS)  # the exact gradient: psi is a constant
    np.testing.assert_allclose(
        x.grad.numpy().reshape(-1, C), through_unit(rows, dx) if prescale else dx, rtol=1e-8, atol=1e-12
    )
    assert all(torch.equal(value, state[name]) for name, value in norm.state_dict().items())


@masked
@prescaled
def test_the_exact_gradient_is_that_of_a_constant_psi(prescale: bool, mask: Tensor | None) -> None:
    """The same output and running average; nu has no part in it, and reaches nothing that the output does not."""
    norm, approximate = powernorm(prescale=prescale), powernorm(prescale=prescale)
    norm.exact_gradient = True
    norm.running_nu.fill_(0.5)
    scale = 1 / np.sqrt(norm.running_psi.numpy() + EPS)
    x, g = random(N, L, C).requires_grad_(), random(N, L, C, seed=50)
    y = norm(x, mask)
    torch.testing.assert_close(y, approximate(x, mask))
    (y[0, 2] * g[0, 2]).sum().backward()
    row, dx = x.detach()[0, 2].numpy(), g[0, 2].numpy() * norm.weight.detach().numpy() * scale
    np.testing.assert_allclose(x.grad[0, 2].numpy(), through_unit(row, dx) if prescale else dx, rtol=1e-9)
    assert x.grad.abs().sum(-1).nonzero().tolist() == [[0, 2]]
    torch.testing.assert_close(norm.running_psi, approximate.running_psi)
    assert bool((norm.running_nu == 0.5).all())


def test_the_running_form_looks_neither_ahead_nor_across() -> None:
    x, base = random(N, L, C), powernorm()(random(N, L, C))
    other = x.clone()
    other[0, 2] += 100.0
    changed = (powernorm()(other) != base).any(-1)
    assert changed.nonzero().tolist() == [[0, 2]]
    assert bool((powernorm("batch")(other) != powernorm("batch")(x)).all())


@pytest.mark.parametrize("stats", ["running", "batch"])
@pytest.mark.parametrize("content", [0.0, 1e3, 1e300, float("inf"), float("nan")])
def test_the_content_of_padding_changes_nothing(stats: str, content: float) -> None:
    results: list[list[Any]] = []
    for fill in (5.0, content):
        norm = powernorm(stats)
        for step in range(2):  # nu has an effect in the second
            x = random(N, L, C, seed=step).masked_fill(~MASK.unsqueeze(-1), fill).requires_grad_()
            norm.zero_grad()
            y = norm(x, MASK)[MASK]
            y.square().sum().backward()
        results.append([y, x.grad, norm.weight.grad, norm.bias.grad, norm.running_psi, norm.running_nu])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_state_and_initial_values() -> None:
    norm = PowerNorm(PowerNormSettings(), NormShape(3, L, bias=True))
    assert {name: value.tolist() for name, value in norm.state_dict().items()} == {
        "weight": [1.0] * 3, "bias": [0.0] * 3, "running_psi": [1.0] * 3, "running_nu": [0.0] * 3,
    }  # fmt: skip
    assert [name for name, _ in norm.named_parameters()] == ["weight", "bias"]


@pytest.mark.parametrize("stats", ["running", "batch"])
def test_one_position_is_enough(stats: str) -> None:
    norm, x = powernorm(stats), random(1, 1, C).requires_grad_()
    y = norm(x)
    y.sum().backward()
    assert bool(y.isfinite().all() and x.grad.isfinite().all())
