"""Where the norms stand, and the settings that leave parts of a block out, against the formulas written out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gptexp.models.attention import rope_table, sinusoidal_table
from gptexp.models.gpt import GPT, Residual
from gptexp.models.registry import NORMS, PLACEMENTS
from gptexp.models.settings import POSITIONS

NORM_VARIANTS = [*NORMS, "batchnorm[batch]", "rbn[batch]", "powernorm[batch]"]
IDS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
N_LAYER, C = 2, 16
ALPHA = 4**0.25  # deepnorm's, of two blocks
Lively = Callable[..., GPT]
every_placement = pytest.mark.parametrize("placement", PLACEMENTS)

# x and f to the sub-layer's output, with its norms.
FORMULAS: dict[str, Callable[[Residual, Tensor, Callable[[Tensor], Tensor]], Tensor]] = {
    "pre": lambda r, x, f: x + f(r.before(x)),
    "post": lambda r, x, f: r.around(x + f(x)),
    "sandwich": lambda r, x, f: x + r.after(f(r.before(x))),
    "output": lambda r, x, f: x + r.after(f(x)),
    "deepnorm": lambda r, x, f: r.around(ALPHA * x + f(x)),
}
WITHOUT_RESIDUAL: dict[str, Callable[[Residual, Tensor, Callable[[Tensor], Tensor]], Tensor]] = {
    "pre": lambda r, x, f: f(r.before(x)),
    "post": lambda r, x, f: r.around(f(x)),
    "sandwich": lambda r, x, f: r.after(f(r.before(x))),
    "output": lambda r, x, f: r.after(f(x)),
}
NORMS_OF = {
    "pre": {"before"}, "post": {"around"}, "sandwich": {"before", "after"}, "output": {"after"}, "deepnorm": {"around"},
}  # fmt: skip
FINAL = {"pre": True, "post": False, "sandwich": True, "output": True, "deepnorm": False}


def naive(model: GPT, formula: Callable[..., Tensor]) -> Tensor:
    """The logits of IDS, one sub-layer after the other."""
    rope = rope_table(5, 8) if model.config.position == "rope" else None
    x = model.wte.weight[IDS]
    if model.config.position == "learned":
        x = x + model.wpe.weight[:5]
    elif model.config.position == "sinusoidal":
        x = x * 4.0 + sinusoidal_table(5, 16)  # sqrt(16): the table must not drown the tokens
    for block in model.blocks:
        x = formula(block.residual1, x, lambda h, block=block: block.attn(h, rope))
        if block.mlp is not None:
            x = formula(block.residual2, x, block.mlp)
    if model.norm_f is not None:
        x = model.norm_f(x)
    logits = x @ model.head.weight.T
    return logits if model.head.bias is None else logits + model.head.bias


def test_every_placement_is_tested() -> None:
    assert set(PLACEMENTS) == set(FORMULAS) == set(NORMS_OF) == set(FINAL) == {*WITHOUT_RESIDUAL, "deepnorm"}


@pytest.mark.parametrize("norm", NORM_VARIANTS)
@pytest.mark.parametrize("position", POSITIONS)
def test_placements_are_their_formulas(lively: Lively, norm: str, position: str) -> None:
    for placement, formula in FORMULAS.items():
        model = lively(norm=norm, placement=placement, position=position, bias=True, tie_weights=False)
        torch.testing.assert_close(model(IDS), naive(model, formula), msg=lambda text, p=placement: f"{p}: {text}")
        assert (model.norm_f is not None) == FINAL[placement]
        for block in model.blocks:
            for residual in (block.residual1, block.residual2):
                assert {name for name, _ in residual.named_children()} == NORMS_OF[placement]


@every_placement
@pytest.mark.parametrize("norm", ["layernorm", "batchnorm"])
def test_placements_differ(lively: Lively, norm: str, placement: str) -> None:
    """A model is no other placement's formula, where that formula has the norms it needs."""
    model = lively(norm=norm, placement=placement)
    for other, formula in FORMULAS.items():
        if NORMS_OF[other] <= NORMS_OF[placement] and other != placement:
            assert not torch.allclose(model(IDS), naive(model, formula), rtol=1e-2, atol=1e-2), other


@pytest.mark.parametrize("n_layer", [1, 3, 8])
def test_deepnorm_weighs_the_residual_by_the_depth(lively: Lively, n_layer: int) -> None:
    """alpha = (2 n_layer)^(1/4), the decoder-only row of DeepNet's table."""
    model = lively(placement="deepnorm", n_layer=n_layer, norm="none")
    x = torch.randn(2, 5, C, generator=torch.Generator().manual_seed(0))
    for block in model.blocks:
        for residual in (block.residual1, block.residual2):
            torch.testing.assert_close(residual(x, torch.zeros_like, None), (2 * n_layer) ** 0.25 * x)


@every_placement
@pytest.mark.parametrize("norm", ["layernorm", "batchnorm"])
def test_the_final_norm_can_be_had_or_left_out(lively: Lively, norm: str, placement: str) -> None:
    for final_norm in (None, False, True):
        model = lively(norm=norm, placement=placement, final_norm=final_norm)
        assert (model.norm_f is not None) == (FINAL[placement] if final_norm is None else final_norm)
        torch.testing.assert_close(model(IDS), naive(model, FORMULAS[placement]))


# --- parts that can be left out ----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["layernorm", "batchnorm", "none"])
@pytest.mark.parametrize("placement", WITHOUT_RESIDUAL)
def test_without_residual_connections(lively: Lively, norm: str, placement: str) -> None:
    model = lively(norm=norm, placement=placement, residual=False, bias=True)
    torch.testing.assert_close(model(IDS), naive(model, WITHOUT_RESIDUAL[placement]))


def dropped_projections(model: GPT, block: Any, rope: None = None) -> tuple[Callable[..., Tensor], ...]:
    def attention(h: Tensor) -> Tensor:
        D = C // 2
        q, k, v = (h @ w.T for w in block.attn.qkv.weight.split(C))
        later = torch.ones(5, 5).triu(1).bool()
        heads = [
            (q[..., s] @ k[..., s].mT / D**0.5).masked_fill(later, -torch.inf).softmax(-1) @ v[..., s]
            for s in (slice(0, D), slice(D, C))
        ]
        return torch.cat(heads, -1)

    def feed_forward(h: Tensor) -> Tensor:
        return torch.relu(h @ block.mlp.fc.weight.T)

    return attention, feed_forward


@every_placement
def test_without_projections(lively: Lively, placement: str) -> None:
    """Heads side by side and a single linear layer with its non-linearity are what joins the residual stream."""
    model = lively(placement=placement, projection=False, activation="relu")
    x = model.wte.weight[IDS] + model.wpe.weight[:5]
    for block in model.blocks:
        assert block.attn.proj is None and block.mlp.proj is None  # noqa: PT018
        assert block.mlp.fc.weight.shape == (C, C)
        attention, feed_forward = dropped_projections(model, block)
        x = FORMULAS[placement](block.residual1, x, attention)
        x = FORMULAS[placement](block.residual2, x, feed_forward)
    x = x if model.norm_f is None else model.norm_f(x)
    torch.testing.assert_close(model(IDS), x @ model.wte.weight.T)


@every_placement
def test_without_feed_forward_layers(lively: Lively, placement: str) -> None:
    model = lively(placement=placement, n_inner=0)
    for block in model.blocks:
        assert [name for name, _ in block.named_children()] == ["residual1", "attn"]
    torch.testing.assert_close(model(IDS), naive(model, FORMULAS[placement]))


@pytest.mark.parametrize(
    ("changes", "width"),
    [
        ({}, 64),
        ({"activation": "swiglu"}, 48),  # 42.7, rounded up to a multiple of 8
        ({"n_inner": 24}, 24),
        ({"n_inner": 24, "activation": "swiglu"}, 24),
        ({"projection": False}, 16),
        ({"projection": False, "activation": "swiglu"}, 16),
        ({"projection": False, "n_inner": 16}, 16),
    ],
    ids=str,
)
def test_the_width_of_the_feed_forward_layer(lively: Lively, changes: dict, width: int) -> None:
    model = lively(**changes)
    for block in model.blocks:
        mlp = block.mlp
        assert mlp.fc.weight.shape == (width, C)
        assert mlp.gate is None or mlp.gate.weight.shape == (width, C)
        assert mlp.proj is None or mlp.proj.weight.shape == (C, width)
        assert (mlp.proj is None) == (not model.config.projection)
    torch.testing.assert_close(model(IDS), naive(model, FORMULAS["pre"]))


@every_placement
def test_without_blocks(lively: Lively, placement: str) -> None:
    """A table of bigrams, of rank 16; the placement decides on the final norm alone."""
    model = lively(placement=placement, n_layer=0, position="none", tie_weights=False)
    x = model.wte.weight[IDS]
    if FINAL[placement]:
        x = F.layer_norm(x, (C,), model.norm_f.weight)
    torch.testing.assert_close(model(IDS), x @ model.head.weight.T)
    assert model.n_params == 2 * 11 * C + (C if FINAL[placement] else 0)
