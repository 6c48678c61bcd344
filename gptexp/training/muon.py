"""Muon: momentum whose updates of matrices are made orthogonal; AdamW for all other parameters."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from gptexp.config.sections import OptimizerConfig
from gptexp.config.settings import settings
from gptexp.registry import OPTIMIZERS
from gptexp.training.optimizers import Parameters

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalized(matrices: Tensor, iterations: int) -> Tensor:
    """Matrices (n, rows, columns), rows <= columns, with all singular values near 1 and the singular vectors unchanged.

    A quintic Newton-Schulz iteration: after a division by the Frobenius norm, each singular value s becomes
    a s + b s^3 + c s^5, with the coefficients that raise small values fastest. The values end between 0.7 and 1.2,
    which is near enough.
    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
    """
    a, b, c = COEFFICIENTS
    x: Tensor = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(Optimizer):
    """Muon for the parameter groups that have "parts", AdamW for the others; each has an "lr" and a "weight_decay".

    A group with "parts" holds matrices, each made of matrices with that many rows, one below the other, such as the
    three of queries, keys and values; () is whole ones. With momentum m, and gradient g,
    m <- momentum m + (1 - momentum) g, u = momentum m + (1 - momentum) g, w <- w (1 - lr weight_decay) - lr scale O(u),
    where O makes orthogonal and scale is the root of max(1, rows / columns), as in `torch.optim.Muon`. That one works
    in bfloat16 on one matrix at a time; this one in the gradient's precision on all matrices of a shape together, which
    takes less than half the time on a CPU without bfloat16.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, momentum: float, iterations: int, betas: tuple[float, float],
        eps: float, fused: bool,
    ) -> None:  # fmt: skip
        defaults = {"lr": 0.0, "weight_decay": 0.0, "momentum": momentum, "iterations": iterations, "betas": betas,
                    "eps": eps, "fused": fused}  # fmt: skip
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient; returns what the closure does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if "parts" in group:
                self._muon(group, parameters)
            else:
                self._adamw(group, parameters)
        return loss

    def _muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        shapes: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for p in parameters:
            state, grad = self.state[p], p.grad
            assert grad is not None
            if not state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(grad, 1 - group["momentum"])
            update = grad.lerp(state["momentum"], group["momentum"])
            for part, u in zip(_cut(p, group["parts"]), _cut(update, group["parts"]), strict=True):
                shapes.setdefault((part.shape[0], part.shape[1]), []).append((part, u))
        for (rows, columns), pairs in shapes.items():
            stack = torch.stack([u.T if rows > columns else u for _, u in pairs])
            made = orthogonalized(stack, group["iterations"])
            lr = group["lr"]
            for (part, _), u in zip(pairs, made, strict=True):
                part.mul_(1 - lr * group["weight_decay"])
                part.add_(u.T if rows > columns else u, alpha=-lr * max(1.0, rows / columns) ** 0.5)

    def _adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p] |= {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                                  "exp_avg_sq": torch.zeros_like(p)}  # fmt: skip
        states = [self.state[p] for p in parameters]
        adamw(
            parameters, [p.grad for p in parameters if p.grad is not None], [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states], [], [s["step"] for s in states],
            foreach=False, fused=group["fused"], amsgrad=False, maximize=False, beta1=group["betas"][0],
            beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
        )  # fmt: skip


def _cut(matrix: Tensor, parts: Sequence[int]) -> Sequence[Tensor]:
    return matrix.split(tuple(parts)) if parts else (matrix,)


@OPTIMIZERS.register("muon")
@settings
class MuonConfig(OptimizerConfig):
    """Muon for the matrices of hidden layers (Jordan et al. 2024), AdamW for everything else."""

    name: Literal["muon"] = "muon"
    learning_rate: Annotated[float, Gt(0)] = 0.02
    """The peak for the matrices of hidden layers; the schedule moves both learning rates alike."""
    adam_learning_rate: Annotated[float, Gt(0)] = 0.01
    """The peak for everything else."""
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.95
    """Of the matrices: how much of its direction each step keeps."""
    iterations: Annotated[int, Ge(1)] = 5
    """Newton-Schulz iterations that make an update orthogonal."""
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.8
    """AdamW's, for everything else."""
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.95
    """AdamW's, for everything else."""
    eps: Annotated[float, Gt(0)] = 1e-10
    """AdamW's, for everything else."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Of the matrices of hidden layers."""

    def build(self, parameters: Parameters, peak: float, fused: bool) -> Optimizer:
        """Muon in a group for the matrices of one part, and for those of the same parts each; AdamW in another one."""
        named, hidden = parameters.named, {n: rows if len(rows) > 1 else () for n, rows in parameters.hidden.items()}
        groups: list[dict[str, Any]] = [
            {"params": [p for n, p in named if hidden.get(n) == parts], "parts": parts, "lr": peak,
             "weight_decay": self.weight_decay} for parts in sorted(set(hidden.values()))
        ]  # fmt: skip
        others = self.adam_learning_rate * peak / self.learning_rate
        groups.append({"params": [p for n, p in named if n not in hidden], "lr": others})
        return Muon(groups, momentum=self.momentum, iterations=self.iterations, betas=(self.beta1, self.beta2),
                    eps=self.eps, fused=fused)  # fmt: skip

    def problems(self, model: Any, hardware: Any) -> list[str]:
        """It needs whole matrices of hidden layers."""
        rules = {
            "optimizer.name=muon: needs whole matrices, which hardware.strategy=fsdp cuts in pieces":
                hardware and hardware.strategy == "fsdp",
            "optimizer.name=muon: model.name=bigram has no hidden layers; allowed: adamw, sgd":
                model and model.name == "bigram",
        }  # fmt: skip
        return [problem for problem, applies in rules.items() if applies]
