"""The formula of every norm in plain tensors, which knows nothing of how the package computes it.

Each is called as formula(x, keep, state, training, **settings) on x (N, L, C), with keep (N, L) False at padding and
state the layer's parameters and buffers by name. It gives y and a penalty, and moves the running averages in state.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]
Formula = Callable[..., tuple[Tensor, Tensor | float]]


def affine(y: Tensor, state: State) -> tuple[Tensor, float]:
    return y * state.get("weight", 1.0) + state.get("bias", 0.0), 0.0


def standardized(x: Tensor, eps: float) -> Tensor:
    centered = x - x.sum(-1, keepdim=True) / x.shape[-1]
    return centered / torch.sqrt((centered * centered).sum(-1, keepdim=True) / x.shape[-1] + eps)


def over_rms(x: Tensor, eps: float, k: int) -> Tensor:
    return x / torch.sqrt((x[..., :k] * x[..., :k]).sum(-1, keepdim=True) / k + eps)


def layernorm(x: Tensor, keep: Tensor, state: State, training: bool, eps: float = 1e-5, **_: Any) -> Any:
    return affine(standardized(x, eps), state)


def in_the_third_block(*args: Any, **options: Any) -> Any:
    y, _ = layernorm(*args, **options)
    return y / math.sqrt(3), 0.0


def rmsnorm(x: Tensor, keep: Tensor, state: State, training: bool, eps: float = 1e-6, fraction: float = 1) -> Any:
    return affine(over_rms(x, eps, math.ceil(fraction * x.shape[-1])), state)


def scalenorm(x: Tensor, keep: Tensor, state: State, training: bool, eps: float) -> Any:
    length = torch.sqrt((x * x).sum(-1, keepdim=True))
    return affine(x / torch.where(length > eps, length, eps), state)


def groupnorm(x: Tensor, keep: Tensor, state: State, training: bool, groups: int = 4, eps: float = 1e-5) -> Any:
    return affine(torch.cat([standardized(part, eps) for part in x.chunk(groups, -1)], -1), state)


def dyt(x: Tensor, keep: Tensor, state: State, training: bool, **_: Any) -> Any:
    return affine(1 - 2 / (torch.exp(2 * state["alpha"] * x) + 1), state)


def derf(x: Tensor, keep: Tensor, state: State, training: bool, **_: Any) -> Any:
    return affine(2 * torch.special.ndtr((state["alpha"] * x + state["shift"]) * 2**0.5) - 1, state)


def none(x: Tensor, keep: Tensor, state: State, training: bool) -> Any:
    return x, 0.0


def batchnorm(
    x: Tensor, keep: Tensor, state: State, training: bool, eps: float = 1e-5, momentum: float = 0.1, stats: str = "all",
    mean_penalty: float = 0.0, std_penalty: float = 0.0,
) -> Any:  # fmt: skip
    """One position after the other, over the rows that its statistics are taken of: all, its own, or those so far."""
    old, columns, penalty, L = dict(state), [], torch.zeros((), dtype=x.dtype), x.shape[1]
    if training:
        state |= {name: old[name].clone() for name in ("running_mean", "running_var")}
    for t in range(L):
        at = slice(None) if stats == "all" else t
        mean, var = old["running_mean"][at], old["running_var"][at]
        s = torch.arange(L)
        rows = x[keep & {"all": s >= 0, "own": s == t, "so far": s <= t}[stats]]
        if training and len(rows) > 1:
            running_mean, running_var = mean, var
            mean = sum(rows) / len(rows)
            squares = sum((rows - mean) ** 2)
            var = squares / len(rows)
            state["running_mean"][at] = (1 - momentum) * running_mean + momentum * mean.detach()
            state["running_var"][at] = (1 - momentum) * running_var + momentum * squares.detach() / (len(rows) - 1)
            paid = mean_penalty * (mean - running_mean) ** 2
            paid = paid + std_penalty * (torch.sqrt(var + eps) - torch.sqrt(running_var + eps)) ** 2
            penalty = penalty + paid.sum() / (L if stats == "all" else 1)
        columns.append((x[:, t] - mean) / torch.sqrt(var + eps))
    return affine(torch.stack(columns, 1), state)[0], penalty


def powernorm(
    x: Tensor, keep: Tensor, state: State, training: bool, eps: float = 1e-5, momentum: float = 0.1,
    stats: str = "running", prescale: bool = True, exact: bool = False,
) -> Any:  # fmt: skip
    """Shen et al. 2020, algorithm 2, with psi for what is psi squared there, and eps."""
    x = over_rms(x, eps, x.shape[-1]) if prescale else x
    psi, nu = state["running_psi"], state["running_nu"]
    if training:
        batch = sum(x[keep] ** 2) / keep.sum()
        state["running_psi"] = (1 - momentum) * psi + momentum * batch.detach()
        psi = batch if stats == "batch" else psi
    z = x / torch.sqrt(psi + eps)

    def backward(dz: Tensor) -> Tensor:
        rows, slopes = z.detach()[keep], dz[keep]
        gamma, lam = sum(rows**2) / len(rows), sum(slopes * rows) / len(rows)
        state["running_nu"] = nu * (1 - momentum * gamma) + momentum * lam
        return (dz - nu * z.detach()) * keep.unsqueeze(-1)

    if training and stats == "running" and not exact and z.requires_grad:
        z.register_hook(backward)
    return affine(z, state)


BATCH = {"eps": 1e-2, "momentum": 0.3}
PENALTIES = {"mean_penalty": 0.3, "std_penalty": 0.2}
FORMULAS: list[tuple[str, dict[str, Any], Formula, dict[str, Any]]] = [
    # the norm, its settings, its formula, and what the formula calls some of the settings
    ("layernorm", {"eps": 1e-2}, layernorm, {}),
    ("layernorm", {"bias": True}, layernorm, {}),
    ("layernorm", {"affine": False, "eps": 1e-2}, layernorm, {}),
    ("layernorm_scaling", {"eps": 1e-2, "bias": True}, in_the_third_block, {}),
    ("rmsnorm", {}, rmsnorm, {}),
    ("rmsnorm", {"eps": 1e-2}, rmsnorm, {}),
    ("prmsnorm", {"eps": 1e-2}, rmsnorm, {"fraction": 1 / 16}),
    ("prmsnorm", {"eps": 1e-2, "fraction": 0.2}, rmsnorm, {}),  # 1.6 channels, rounded up
    ("prmsnorm", {"fraction": 1.0}, rmsnorm, {}),
    ("scalenorm", {}, scalenorm, {"eps": 1e-5}),
    ("scalenorm", {"eps": 6.0}, scalenorm, {}),  # some rows are shorter
    ("groupnorm", {}, groupnorm, {}),
    ("groupnorm", {"groups": 2, "eps": 1e-2}, groupnorm, {}),
    ("groupnorm", {"groups": 1}, groupnorm, {}),
    ("dyt", {"alpha": 2.0}, dyt, {}),
    ("derf", {"alpha": 0.8}, derf, {}),
    ("none", {}, none, {}),
    ("batchnorm", BATCH | {"stats": ["batch", "time"]}, batchnorm, {"stats": "all"}),
    ("batchnorm", BATCH | {"stats": ["batch"]}, batchnorm, {"stats": "own"}),
    ("rbn", BATCH | PENALTIES | {"stats": ["batch", "time"]}, batchnorm, {"stats": "all"}),
    ("rbn", BATCH | PENALTIES | {"stats": ["batch"]}, batchnorm, {"stats": "own"}),
    ("causal_batchnorm", BATCH, batchnorm, {"stats": "so far"}),
    ("powernorm", BATCH | {"prescale": True}, powernorm, {}),
    ("powernorm", BATCH | {"prescale": False}, powernorm, {}),
    ("powernorm", BATCH | {"prescale": True, "stats": "batch"}, powernorm, {}),
    ("powernorm", BATCH | {"prescale": False, "stats": "batch"}, powernorm, {}),
]
