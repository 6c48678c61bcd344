"""The settings of every norm: their default values, that each has an effect, and the initial values of parameters."""

from dataclasses import asdict

import pytest
import torch
from torch import Tensor, nn

from gptexp.models.norms import build_norm
from gptexp.models.registry import NORMS, NormShape

N, L, C = 3, 5, 16
SHAPE = NormShape(C, L)

OTHER = {
    "eps": 0.25, "momentum": 0.25, "mean_penalty": 0.25, "std_penalty": 0.25, "fraction": 0.25, "alpha": 0.25,
    "groups": 2, "affine": False, "bias": True, "prescale": False, "stats": ["batch"],
}  # fmt: skip
"""A value other than the default of each setting."""


def outcome(norm: nn.Module) -> dict[str, Tensor]:
    """The output of a second step of training, what it learned, and its penalty."""
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(N, L, C, dtype=torch.float64, generator=generator).mul_(1e-2).requires_grad_()
        y = norm.train()(x)
        y.square().sum().backward()
    penalty = getattr(norm, "penalty", None)
    return {"y": y.detach(), **norm.state_dict(), **({} if penalty is None else {"penalty": penalty.detach()})}


@pytest.mark.parametrize(
    ("name", "field"), [(name, field) for name in NORMS for field in NORMS[name].settings.__dataclass_fields__]
)
def test_settings_reach_the_layer(name: str, field: str) -> None:
    """Another value makes another layer."""
    value = "batch" if (name, field) == ("powernorm", "stats") else OTHER[field]
    default, changed = NORMS[name].settings(), NORMS[name].settings(**{field: value})
    assert getattr(default, field) != value
    first, second = (build_norm(name, settings, SHAPE).double() for settings in (default, changed))
    if isinstance(getattr(first, field, None), float):
        assert getattr(second, field) == value != getattr(first, field)
    before, after = outcome(first), outcome(second)
    assert before.keys() != after.keys() or any(
        before[key].shape != after[key].shape or not torch.allclose(before[key], after[key]) for key in before
    )


def test_default_settings_are_the_published_ones() -> None:
    assert {name: asdict(norm.settings()) for name, norm in NORMS.items()} == {
        "layernorm": {"eps": 1e-5, "affine": True, "bias": None},
        "rmsnorm": {"eps": 1e-6},
        "prmsnorm": {"eps": 1e-6, "fraction": 1 / 16},
        "scalenorm": {"eps": 1e-5},
        "dyt": {"alpha": 0.5},
        "groupnorm": {"eps": 1e-5, "groups": 4},
        "batchnorm": {"eps": 1e-5, "momentum": 0.1, "stats": ["batch", "time"]},
        "rbn": {
            "eps": 1e-5, "momentum": 0.1, "stats": ["batch", "time"], "mean_penalty": 0.1, "std_penalty": 0.01,
        },
        "causal_batchnorm": {"eps": 1e-5, "momentum": 0.1},
        "powernorm": {"eps": 1e-5, "momentum": 0.1, "stats": "running", "prescale": True},
        "none": {},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("layernorm", {}, {"weight": [1.0] * C, "bias": [0.0] * C}),
        ("layernorm", {"affine": False}, {}),
        ("rmsnorm", {}, {"weight": [1.0] * C}),
        ("prmsnorm", {}, {"weight": [1.0] * C}),
        ("scalenorm", {}, {"weight": [4.0]}),  # sqrt(16)
        ("dyt", {}, {"alpha": [0.5], "weight": [1.0] * C, "bias": [0.0] * C}),
        ("dyt", {"alpha": 0.75}, {"alpha": [0.75], "weight": [1.0] * C, "bias": [0.0] * C}),
        ("groupnorm", {}, {"weight": [1.0] * C, "bias": [0.0] * C}),
        ("batchnorm", {}, {"weight": [1.0] * C, "bias": [0.0] * C}),
        ("rbn", {}, {"weight": [1.0] * C, "bias": [0.0] * C}),
        ("causal_batchnorm", {}, {"weight": [1.0] * C, "bias": [0.0] * C}),
        ("powernorm", {}, {"weight": [1.0] * C, "bias": [0.0] * C}),
        ("none", {}, {}),
    ],
    ids=str,
)
def test_initial_values_are_constants(name: str, options: dict, expected: dict[str, list[float]]) -> None:
    norm = build_norm(name, NORMS[name].settings(**options), NormShape(C, L, bias=True))
    assert {n: p.tolist() for n, p in norm.named_parameters()} == expected
