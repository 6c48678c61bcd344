"""Where the norms stand, and the settings that leave parts of a block out, against the formulas written out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gptexp.models.gpt import GPT
from gptexp.models.placements import Residual
from gptexp.models.positions import NOTHING, Relative, rope_table, sinusoidal_table
from gptexp.registry import PLACEMENTS, POSITIONS
from tests.models.conftest import PAIRS

IDS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
C = 16
ALPHA = 4**0.25  # deepnorm's, of two blocks
Lively = Callable[..., GPT]

SUBLAYERS: dict[str, Callable[[Residual, Tensor, Callable[[Tensor], Tensor], float], Tensor]] = {
    # the residual connection, its input x, the sub-layer f, and a: 1, or 0 without the connection
    "pre": lambda r, x, f, a: a * x + f(r.before(x)),
    "post": lambda r, x, f, a: r.around(a * x + f(x)),
    "sandwich": lambda r, x, f, a: a * x + r.after(f(r.before(x))),
    "output": lambda r, x, f, a: a * x + r.after(f(x)),
    "deepnorm": lambda r, x, f, a: r.around(ALPHA * x + f(x)),
    "bare": lambda r, x, f, a: a * x + f(x),
    "stream": lambda r, x, f, a: a * r.stream(x) + f(r.stream(x)),
}
MIXED: dict[str, Callable[[int, str], str]] = {
    "mixln": lambda layer, part: "post" if layer == 0 else "pre",  # with a fraction of 1/2
    "hybrid": lambda layer, part: "bare" if part == "attention" else "stream",
}
TWO_STREAMS = {"dual"}
WITHOUT_FINAL = {"post", "deepnorm"}
every_placement = pytest.mark.parametrize("placement", PLACEMENTS)


def test_every_placement_has_a_formula() -> None:
    assert {*SUBLAYERS, *MIXED, *TWO_STREAMS} - {"bare", "stream"} == set(PLACEMENTS)


def relative(position: str) -> Relative:
    """For five positions of two heads of 8 channels."""
    if position == "alibi":  # slopes of 1/16 and 1/256
        distance = torch.arange(5) - torch.arange(5)[:, None]
        return Relative(bias=torch.stack([distance / 16, distance / 256]).masked_fill(distance > 0, -torch.inf))
    return Relative(rotation=rope_table(5, 8)) if position == "rope" else NOTHING


def naive(model: GPT) -> Tensor:
    """The logits of IDS, one sub-layer after the other."""
    c, x = model.config, model.wte.weight[IDS]
    if c.position == "learned":
        x = x + model.wpe.weight[:5]
    elif c.position == "sinusoidal":
        x = x * 4.0 + sinusoidal_table(5, C)  # sqrt(16): the table must not drown the tokens
    q = x  # the unnormalized stream of dual
    for layer, block in enumerate(model.blocks):
        parts = {"attention": (block.residual1, lambda h, b=block: b.attn(h, relative(c.position)))}
        if block.mlp is not None:
            parts["mlp"] = block.residual2, block.mlp
        for part, (residual, f) in parts.items():
            if c.placement in TWO_STREAMS:
                y = f(x)
                x, q = residual.around(x + y), q + y
            else:
                kind = MIXED[c.placement](layer, part) if c.placement in MIXED else c.placement
                x = SUBLAYERS[kind](residual, x, f, float(c.residual))
    final = model.norm_f or (lambda y: y)
    x = x + final(q) if c.placement in TWO_STREAMS else final(x)
    logits = x @ model.head.weight.T
    return logits if model.head.bias is None else logits + model.head.bias


def check(lively: Lively, **changes: Any) -> GPT:
    model = lively(**{"placements": {"mixln": {"fraction": 0.5}}, **changes})
    torch.testing.assert_close(model(IDS), naive(model))
    return model


@pytest.mark.parametrize(("norm", "placement"), PAIRS)
def test_placements_are_their_formulas(lively: Lively, norm: str, placement: str) -> None:
    model = check(lively, norm=norm, placement=placement, bias=True, tie_weights=False)
    assert (model.norm_f is None) == (placement in WITHOUT_FINAL)


@pytest.mark.parametrize("position", POSITIONS)
@every_placement
def test_positions_go_with_every_placement(lively: Lively, position: str, placement: str) -> None:
    check(lively, placement=placement, position=position)


@pytest.mark.parametrize(
    "changes",
    [{"final_norm": False}, {"final_norm": True}, {"residual": False}, {"projection": False}, {"n_inner": 0}],
    ids=str,
)
@every_placement
def test_parts_can_be_left_out(lively: Lively, placement: str, changes: dict) -> None:
    if "residual" in changes and PLACEMENTS[placement].made.needs_residual:
        return
    model = check(lively, placement=placement, **changes)
    final = changes.get("final_norm", placement not in WITHOUT_FINAL)
    assert (model.norm_f is not None) == final
    for block in model.blocks:
        assert (block.attn.proj is None) == (changes == {"projection": False})
        assert (block.mlp is None) == (block.residual2 is None) == (changes == {"n_inner": 0})


@every_placement
def test_without_blocks(lively: Lively, placement: str) -> None:
    """A table of bigrams, of rank 16; the placement decides on the final norm, and dual adds its two streams."""
    model = lively(placement=placement, n_layer=0, position="none", tie_weights=False)
    x = model.wte.weight[IDS]
    if placement not in WITHOUT_FINAL:
        x = F.layer_norm(x, (C,), model.norm_f.weight) + (x if placement in TWO_STREAMS else 0)
    torch.testing.assert_close(model(IDS), x @ model.head.weight.T)


@pytest.mark.parametrize(("fraction", "post"), [(0.0, 0), (0.25, 1), (0.49, 1), (0.5, 2), (1.0, 4)])
def test_the_first_blocks_of_mixln_are_post_norm(lively: Lively, fraction: float, post: int) -> None:
    model = lively(n_layer=4, placement="mixln", placements={"mixln": {"fraction": fraction}})
    norms = [[name for name, _ in r.named_children()] for b in model.blocks for r in (b.residual1, b.residual2)]
    assert norms == [["around"]] * 2 * post + [["before"]] * 2 * (4 - post)


@pytest.mark.parametrize("n_layer", [1, 3, 8])
def test_deepnorm_weighs_the_residual_by_the_depth(lively: Lively, n_layer: int) -> None:
    """alpha = (2 n_layer)^(1/4), the decoder-only row of DeepNet's table."""
    model = lively(placement="deepnorm", n_layer=n_layer, norm="none")
    x = torch.randn(2, 5, C, generator=torch.Generator().manual_seed(0))
    for block in model.blocks:
        for residual in (block.residual1, block.residual2):
            torch.testing.assert_close(residual(x, torch.zeros_like, None), (2 * n_layer) ** 0.25 * x)


def test_each_part_can_have_a_norm_of_its_own(lively: Lively) -> None:
    own = {"norm_attention": "rmsnorm", "norm_mlp": "scalenorm", "norm_final": "none"}
    model = check(lively, placement="sandwich", **own)
    for block in model.blocks:
        kinds = [[type(norm).__name__ for norm in r.children()] for r in (block.residual1, block.residual2)]
        assert kinds == [["RMSNorm", "RMSNorm"], ["ScaleNorm", "ScaleNorm"]]
    assert type(model.norm_f).__name__ == "Identity"
    assert lively(norm_final="rmsnorm").config.label == "layernorm-final_rmsnorm-pre-h2"


def test_layernorm_scaling_divides_by_the_root_of_the_depth(lively: Lively) -> None:
    """The block's number counts from 1; the final norm is not scaled."""
    model = lively(norm="layernorm_scaling", n_layer=3)
    norms = {depth: (b.residual1.before, b.residual2.before) for depth, b in enumerate(model.blocks, 1)}
    x = torch.randn(2, 5, C, generator=torch.Generator().manual_seed(0))
    for depth, some in {**norms, 1.0: (*norms[1], model.norm_f)}.items():
        for norm in some:
            torch.testing.assert_close(norm(x) * depth**0.5, F.layer_norm(x, (C,), norm.weight))
