"""The norms that work within one position: layernorm, rmsnorm and none. Batch norm has a file of its own."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gptexp.models.norms import Identity, LayerNorm, RMSNorm, build_norm
from gptexp.models.settings import NORMS, GPTConfig, LayerNormSettings, NoSettings, RMSNormSettings

N, L, C = 3, 5, 16


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
    return moved(LayerNorm(LayerNormSettings(eps), GPTConfig(n_embd=C, bias=bias)))


def rmsnorm(eps: float = 1e-6) -> RMSNorm:
    return moved(RMSNorm(RMSNormSettings(eps), GPTConfig(n_embd=C)))


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
    norm, x = Identity(NoSettings(), GPTConfig(n_embd=C)), random(N, L, C)
    assert torch.equal(norm(x), x)
    assert torch.equal(norm.train()(x, torch.ones(N, L, dtype=torch.bool)), x)
    assert not norm.state_dict()


@pytest.mark.parametrize("norm", [layernorm(True), rmsnorm()], ids=["layernorm", "rmsnorm"])
def test_a_position_is_normalised_by_itself(norm: nn.Module) -> None:
    x, other = random(N, L, C), random(N, L, C, seed=1)
    other[1, 2] = x[1, 2]
    mask = torch.arange(L) < torch.tensor([[5], [3], [1]])
    torch.testing.assert_close(norm(x)[1, 2], norm(other)[1, 2], rtol=0, atol=1e-14)
    assert torch.equal(norm(x, mask)[mask], norm(x)[mask])


@pytest.mark.parametrize("name", NORMS)
def test_settings_reach_the_layer(name: str) -> None:
    """Every field of a norm's settings becomes an attribute with another value, or changes the shape of a buffer."""
    default = build_norm(GPTConfig(norm=name, n_embd=C))
    for field in NORMS[name].settings.__dataclass_fields__:
        value = ["batch"] if field == "stats" else 0.25
        changed = build_norm(GPTConfig(norm=name, n_embd=C, norms={name: {field: value}}))
        if field == "stats":
            assert changed.running_mean.shape != default.running_mean.shape
        else:
            assert getattr(changed, field) == 0.25 != getattr(default, field)


def test_default_settings_are_the_published_ones() -> None:
    assert {name: asdict(norm.settings()) for name, norm in NORMS.items()} == {
        "layernorm": {"eps": 1e-5},
        "rmsnorm": {"eps": 1e-6},
        "batchnorm": {"eps": 1e-5, "momentum": 0.1, "stats": ["batch", "time"]},
        "none": {},
    }


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
    config = GPTConfig(n_embd=C)
    centred = LayerNorm(LayerNormSettings(), config).double()(x).detach()
    assert float(centred.mean().abs()) < 1e-9
    assert float(centred.var(unbiased=False)) == pytest.approx(1.0, abs=2e-3)  # 1 - eps / variance
    scaled = RMSNorm(RMSNormSettings(), config).double()(x).detach()
    assert float(scaled.square().mean()) == pytest.approx(1.0, abs=1e-3)
