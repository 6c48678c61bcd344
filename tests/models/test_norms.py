"""The norms that work within one position. Those that cross positions have files of their own."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gptexp.models.norms import Identity, LayerNorm, RMSNorm, build_norm
from gptexp.models.registry import NORMS, LayerNormSettings, NormSettings, NormShape, RMSNormSettings

N, L, C = 3, 5, 16
SHAPE = NormShape(C, L)


def random(*shape: int, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + shift


def moved(norm: nn.Module) -> nn.Module:
    """The norm in float64 with its weight and bias away from 1 and 0."""
    norm = norm.double()
    with torch.no_grad():
        for i, p in enumerate(norm.parameters()):
            p.copy_(random(*p.shape, seed=10 + i, shift=0.7))
    return norm


def layernorm(bias: bool, eps: float = 1e-5) -> LayerNorm:
    return moved(LayerNorm(LayerNormSettings(eps), NormShape(C, L, bias)))


def rmsnorm(eps: float = 1e-6) -> RMSNorm:
    return moved(RMSNorm(RMSNormSettings(eps), NormShape(C, L)))


def made(name: str, *, bias: bool = False, **options: Any) -> nn.Module:
    """The registered norm with these settings; bias is the model's."""
    return moved(build_norm(name, NORMS[name].settings(**options), NormShape(C, L, bias)))


def output_and_gradients(norm: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = norm(x)
    (y * random(*y.shape, seed=99)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in norm.parameters())]


# A scale of 1e-3 makes x's variance comparable with eps, so that a misplaced eps shows.
@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
@pytest.mark.parametrize("bias", [True, False])
def test_layernorm_is_its_formula(bias: bool, eps: float, scale: float) -> None:
    norm, x = layernorm(bias, eps), random(N, L, C, scale=scale, shift=scale)
    a, w = x.numpy(), norm.weight.detach().numpy()
    mean = a.mean(-1, keepdims=True)
    var = ((a - mean) ** 2).mean(-1, keepdims=True)  # biased: divided by C
    expected = (a - mean) / np.sqrt(var + eps) * w + (norm.bias.detach().numpy() if bias else 0.0)
    np.testing.assert_allclose(norm(x).detach().numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_layernorm_is_torch_layernorm(bias: bool) -> None:
    ours, theirs = layernorm(bias), nn.LayerNorm(C, eps=1e-5, bias=bias).double()
    theirs.load_state_dict(ours.state_dict())
    x = random(N, L, C, scale=2.0, shift=1.0)
    for mine, other in zip(output_and_gradients(ours, x), output_and_gradients(theirs, x), strict=True):
        torch.testing.assert_close(mine, other)


def test_layernorm_has_a_bias_only_when_the_model_has() -> None:
    assert [n for n, _ in layernorm(True).named_parameters()] == ["weight", "bias"]
    assert [n for n, _ in layernorm(False).named_parameters()] == ["weight"]


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_rmsnorm_is_its_formula(eps: float, scale: float) -> None:
    norm, x = rmsnorm(eps), random(N, L, C, scale=scale, shift=scale)
    a = x.numpy()
    expected = a / np.sqrt((a**2).mean(-1, keepdims=True) + eps) * norm.weight.detach().numpy()
    np.testing.assert_allclose(norm(x).detach().numpy(), expected, rtol=1e-10, atol=1e-12)


def test_rmsnorm_is_torch_rmsnorm() -> None:
    ours, theirs = rmsnorm(), nn.RMSNorm(C, eps=1e-6).double()
    theirs.load_state_dict(ours.state_dict())
    x = random(N, L, C, scale=2.0, shift=1.0)
    for mine, other in zip(output_and_gradients(ours, x), output_and_gradients(theirs, x), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rmsnorm_of_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    norm = rmsnorm().to(dtype)
    x = random(N, L, C, scale=300.0).to(dtype)  # its squares overflow float16, whose largest value is 65504
    wide = x.float()
    expected = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(dtype) * norm.weight
    assert norm(x).dtype == dtype
    torch.testing.assert_close(norm(x), expected, rtol=0, atol=0)


def test_none_is_the_identity() -> None:
    norm, x = Identity(NormSettings(), NormShape(C, L)), random(N, L, C)
    assert torch.equal(norm(x), x)
    assert torch.equal(norm.train()(x, torch.ones(N, L, dtype=torch.bool)), x)
    assert not norm.state_dict()


# --- the others, against formulas in plain tensors, gradients included -------------------------------------------


class Formula(nn.Module):
    """f(x, *parameters), with copies of another layer's parameters."""

    def __init__(self, f: Callable[..., Tensor], norm: nn.Module) -> None:
        super().__init__()
        self.f = f
        self.copies = nn.ParameterList(p.detach().clone() for p in norm.parameters())

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x, *self.copies)


def standardised(x: Tensor, eps: float) -> Tensor:
    centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
    return centred / torch.sqrt((centred * centred).sum(-1, keepdim=True) / x.shape[-1] + eps)


def partial(k: int, eps: float) -> Callable[..., Tensor]:
    return lambda x, w: x / torch.sqrt((x[..., :k] * x[..., :k]).sum(-1, keepdim=True) / k + eps) * w


def scaled(eps: float) -> Callable[..., Tensor]:
    def f(x: Tensor, w: Tensor) -> Tensor:
        length = torch.sqrt((x * x).sum(-1, keepdim=True))
        return w * x / torch.where(length > eps, length, eps)

    return f


def grouped(groups: int, eps: float) -> Callable[..., Tensor]:
    size = C // groups

    def f(x: Tensor, w: Tensor, b: Tensor | float = 0.0) -> Tensor:
        parts = [standardised(x[..., g * size : (g + 1) * size], eps) for g in range(groups)]
        return torch.cat(parts, -1) * w + b

    return f


def squashed(x: Tensor, alpha: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return (1 - 2 / (torch.exp(2 * alpha * x) + 1)) * w + b


FORMULAS = [
    ("layernorm", {"affine": False, "eps": 1e-2}, lambda x: standardised(x, 1e-2)),
    ("prmsnorm", {"eps": 1e-2}, partial(1, 1e-2)),  # 1/16 of the channels
    ("prmsnorm", {"fraction": 0.1}, partial(2, 1e-6)),  # 1.6, rounded up
    ("prmsnorm", {"fraction": 0.5, "eps": 1e-2}, partial(8, 1e-2)),
    ("prmsnorm", {"fraction": 1.0}, partial(16, 1e-6)),
    ("scalenorm", {}, scaled(1e-5)),
    ("scalenorm", {"eps": 1e-2}, scaled(1e-2)),
    ("dyt", {}, squashed),
    ("dyt", {"alpha": 2.0}, squashed),
    ("groupnorm", {}, grouped(4, 1e-5)),
    ("groupnorm", {"bias": True, "groups": 2, "eps": 1e-2}, grouped(2, 1e-2)),
    ("groupnorm", {"groups": 8}, grouped(8, 1e-5)),
]


@pytest.mark.parametrize(("name", "options", "formula"), FORMULAS, ids=lambda v: None if callable(v) else str(v))
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_norms_are_their_formulas(name: str, options: dict, formula: Callable[..., Tensor], scale: float) -> None:
    norm, x = made(name, **options), random(N, L, C, scale=scale, shift=scale)
    for mine, other in zip(output_and_gradients(norm, x), output_and_gradients(Formula(formula, norm), x), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


def test_layernorm_without_affine_is_that_of_torch() -> None:
    ours, theirs = made("layernorm", affine=False), nn.LayerNorm(C, elementwise_affine=False).double()
    x = random(N, L, C, scale=2.0, shift=1.0)
    for mine, other in zip(output_and_gradients(ours, x), output_and_gradients(theirs, x), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("of_model", [False, True])
@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, None),
        ({"bias": True}, ["weight", "bias"]),
        ({"bias": False}, ["weight"]),
        ({"affine": False}, []),
        ({"affine": False, "bias": False}, []),
    ],
    ids=str,
)
def test_layernorm_may_have_a_bias_of_its_own(of_model: bool, options: dict, names: list[str] | None) -> None:
    norm = LayerNorm(LayerNormSettings(**options), NormShape(C, L, of_model))
    if names is None:  # the model's
        names = ["weight", "bias"] if of_model else ["weight"]
    assert [n for n, _ in norm.named_parameters()] == names


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_groupnorm_is_that_of_torch_at_each_position(groups: int, bias: bool) -> None:
    ours, theirs = made("groupnorm", bias=bias, groups=groups), nn.GroupNorm(groups, C).double()
    theirs.load_state_dict({"bias": torch.zeros(C), **ours.state_dict()})
    x = random(N, L, C, scale=2.0, shift=1.0)
    mine, other = output_and_gradients(ours, x), output_and_gradients(theirs, x.view(N * L, C))
    for a, b in zip(mine, other if bias else other[:-1], strict=True):
        torch.testing.assert_close(a, b.view_as(a), msg=lambda text: f"{groups} {bias}: {text}")


def test_one_group_of_all_channels_is_layernorm() -> None:
    ours, x = made("groupnorm", groups=1, eps=1e-3), random(N, L, C)
    theirs = layernorm(False, eps=1e-3)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))


def test_prmsnorm_of_all_channels_is_torch_rmsnorm() -> None:
    ours, theirs = made("prmsnorm", fraction=1.0, eps=1e-3), nn.RMSNorm(C, eps=1e-3).double()
    theirs.load_state_dict(ours.state_dict())
    x = random(N, L, C, scale=2.0, shift=1.0)
    for mine, other in zip(output_and_gradients(ours, x), output_and_gradients(theirs, x), strict=True):
        torch.testing.assert_close(mine, other)


def test_scalenorm_starts_as_rmsnorm() -> None:
    """g x / |x| with g = sqrt(C) is x over its root mean square."""
    scale_norm, x = build_norm("scalenorm", NORMS["scalenorm"].settings(), SHAPE).double(), random(N, L, C)
    torch.testing.assert_close(scale_norm(x), nn.RMSNorm(C, eps=1e-12).double()(x), rtol=1e-7, atol=1e-7)


def test_groups_see_nothing_of_each_other() -> None:
    norm, x = made("groupnorm", groups=4), random(N, L, C)
    other = x.clone()
    other[..., 4:8] += random(N, L, 4, seed=1)
    changed = norm(other) != norm(x)
    assert bool(changed[..., 4:8].all())
    assert not bool(changed[..., :4].any() or changed[..., 8:].any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "options", "formula"),
    [
        ("prmsnorm", {"fraction": 0.5}, partial(8, 1e-6)),
        ("scalenorm", {}, scaled(1e-5)),
    ],
    ids=["prmsnorm", "scalenorm"],
)
def test_half_precision_is_divided_in_float32(
    name: str, options: dict, formula: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    norm = made(name, **options).to(dtype)
    x = random(N, L, C, scale=300.0).to(dtype)  # its squares overflow float16
    expected = formula(x.double(), torch.ones(1)).to(dtype) * norm.weight
    assert norm(x).dtype == dtype
    torch.testing.assert_close(norm(x), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_layer_of_half_precision_returns_half_precision(name: str, mode: str, masked: bool) -> None:
    """And is near what it is in float64."""
    wide = made(name, bias=True).train(mode == "train")
    half, x = copy.deepcopy(wide).to(torch.bfloat16), random(N, L, C, shift=1.0).to(torch.bfloat16)
    mask = torch.ones(N, L, dtype=torch.bool) if masked else None
    expected, y = wide(x.double(), mask), half(x, mask)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("fraction", "channels", "k"), [(0.07, 100, 7), (0.55, 100, 55), (0.071, 100, 8), (1e-9, 16, 1), (1.0, 7, 7)]
)
def test_prmsnorm_rounds_its_share_of_the_channels_up(fraction: float, channels: int, k: int) -> None:
    """Where it is not whole: the product of 0.07 and 100 is a little more than 7 in floating point."""
    norm = build_norm("prmsnorm", NORMS["prmsnorm"].settings(fraction=fraction, eps=1e-12), NormShape(channels, L))
    x = random(1, 1, channels).float()
    torch.testing.assert_close(norm(x), x / x[..., :k].square().mean().sqrt())


LOCAL = [
    ("layernorm", {}), ("layernorm", {"affine": False}), ("rmsnorm", {}), ("prmsnorm", {}), ("scalenorm", {}),
    ("dyt", {}), ("groupnorm", {}), ("none", {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), LOCAL, ids=str)
def test_a_position_is_normalised_by_itself(name: str, options: dict) -> None:
    norm = made(name, bias=True, **options)
    x, other = random(N, L, C), random(N, L, C, seed=1)
    other[1, 2] = x[1, 2]
    mask = torch.arange(L) < torch.tensor([[5], [3], [1]])
    torch.testing.assert_close(norm(x)[1, 2], norm(other)[1, 2], rtol=0, atol=1e-14)
    assert torch.equal(norm(x, mask)[mask], norm(x)[mask])
    assert torch.equal(norm.train()(x), norm.eval()(x))
    assert norm(x.transpose(0, 1)).shape == (L, N, C)  # of any strides
    torch.testing.assert_close(norm(x.transpose(0, 1)), norm(x).transpose(0, 1), rtol=0, atol=1e-14)


finite = st.floats(-10.0, 10.0, allow_subnormal=False)
rows = st.lists(finite, min_size=C, max_size=C).map(lambda v: torch.tensor(v, dtype=torch.float64).view(1, 1, C))
varied = rows.filter(lambda x: float(x.var()) > 1e-2)  # far above eps


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(x=varied, factor=st.floats(0.1, 100.0))
def test_scaling_x_changes_neither_layernorm_nor_rmsnorm(x: Tensor, factor: float) -> None:
    for norm in (layernorm(True, eps=1e-12), rmsnorm(eps=1e-12)):
        torch.testing.assert_close(norm(x * factor), norm(x), rtol=1e-6, atol=1e-7)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(x=varied, shift=st.floats(0.5, 100.0))
def test_shifting_x_changes_rmsnorm_but_not_layernorm(x: Tensor, shift: float) -> None:
    torch.testing.assert_close(layernorm(True)(x + shift), layernorm(True)(x), rtol=1e-7, atol=1e-7)
    assert not torch.allclose(rmsnorm()(x + shift), rmsnorm()(x), rtol=1e-7, atol=1e-7)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(x=varied)
def test_normalised_rows_have_unit_size(x: Tensor) -> None:
    centred = LayerNorm(LayerNormSettings(), SHAPE).double()(x).detach()
    assert float(centred.mean().abs()) < 1e-9
    assert float(centred.var(unbiased=False)) == pytest.approx(1.0, abs=2e-3)  # 1 - eps / variance
    scaled = RMSNorm(RMSNormSettings(), SHAPE).double()(x).detach()
    assert float(scaled.square().mean()) == pytest.approx(1.0, abs=1e-3)
