"""What a model's output depends on, measured on the model itself in float64.

Gradients answer two questions about any variant. Does the output at position t depend on a later token? Then the
training loss sees what it is meant to predict. And does it depend on another sequence of the batch?
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gptexp.models.gpt import Block
from gptexp.models.language_model import LanguageModel
from gptexp.models.norms import ApproximateGradient
from gptexp.models.placements import Residual
from gptexp.models.settings import build_model

NEGLIGIBLE = 1e-9
"""A share of the gradient below this is rounding."""

_CONTAINERS = (LanguageModel, nn.ModuleList, Block, Residual)


@dataclass(frozen=True)
class Share:
    """Where the gradient of a layer's output, at the first positions of one sequence, goes: shares of its norm."""

    layer: str  # name of the layer, or "model"
    future: float  # to later positions of the same sequence
    others: float  # to the other sequences of the batch

    @property
    def looks_ahead(self) -> bool:
        """Whether the output depends on later positions of the same sequence."""
        return self.future > NEGLIGIBLE

    @property
    def couples(self) -> bool:
        """Whether the output depends on other sequences of the batch."""
        return self.others > NEGLIGIBLE


@dataclass(frozen=True)
class Influence:
    """Which positions each token influences."""

    map: Tensor  # (L, L), about |d logits[0, t] / d x[0, s]| at row t and column s, with x the embedded tokens
    others: Tensor  # (L, L), the same for |d logits[0, t] / d x[n, s]|, over all other sequences n
    model: Share  # the whole model's shares
    layers: list[Share]  # those of its layers, in the order in which data meets them


def measure(model: LanguageModel, ids: Tensor, training: bool) -> Influence:
    """Measure a model in train mode or in eval mode, without dropout, on ids (N, L) int64, N at least 2.

    |J| of each Jacobian J is estimated from one random direction v of the logits, as |v J|^2 has the mean |J|^2. The
    model may be on any device and in any precision, and is not changed.

    Raises:
        ValueError: when the model cannot be trained on such a batch.
    """
    model = prepared(model, training)
    L = ids.shape[1]
    x, logits, inner = _trace(model, ids.to(model.wte.weight.device))
    directions = torch.randn(logits.shape[1:], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    directions = directions.to(logits.device)
    own, others = torch.zeros(2, L, L, dtype=torch.float64)
    for t in range(L):
        (grad,) = torch.autograd.grad(logits[0, t] @ directions[t], x, retain_graph=True)
        reach = grad.square().sum(-1).cpu()  # (N, L)
        own[t], others[t] = reach[0].sqrt(), reach[1:].sum(0).sqrt()
    total = (own.square().sum() + others.square().sum()).sqrt().clamp(min=1e-300)
    whole = Share("model", float(own.triu(1).norm() / total), float(others.norm() / total))
    return Influence(own, others, whole, [_share(name, a, y) for name, a, y in inner])


def train_mode(config: Any) -> Share:
    """What the training loss of this configuration depends on, measured on a model of its first two layers."""
    if config.counted:
        return Share("model", 0.0, 0.0)
    small = replace(config, n_layer=min(2, config.n_layer)) if hasattr(config, "n_layer") else config
    model = prepared(build_model(small), training=True)
    shape = (4, min(8, config.block_size))
    x, logits, _ = _trace(model, torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0)))
    return _share("model", x, logits)


def prepared(model: LanguageModel, training: bool) -> Any:
    """A copy in float64 with exact gradients and without dropout, in train or in eval mode."""
    model = copy.deepcopy(model).double().train(training)
    for module in model.modules():
        if isinstance(module, ApproximateGradient):
            module.exact_gradient = True
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0  # type: ignore[assignment]
    return model


def _trace(model: Any, ids: Tensor) -> tuple[Tensor, Tensor, list[tuple[str, Tensor, Tensor]]]:
    """A forward pass of a `prepared` model in which every token has an embedding of its own.

    Returns:
        those embeddings (N, L, C); logits (N, L, V); a name, input and output for each layer.
    """
    inner: list[tuple[str, Tensor, Tensor]] = []
    for name, layer in named_layers(model):
        if not isinstance(layer, nn.Embedding):
            layer.register_forward_hook(lambda _, args, y, name=name: inner.append((name, args[0], y)))
    weight = model.wte.weight.detach()
    x = weight[ids].requires_grad_()
    numbers = torch.arange(1, ids.numel() + 1, device=ids.device).view(ids.shape)  # 0 is for padding
    ngram = getattr(model, "ngram", None)
    if ngram is not None:  # it needs the true tokens; what it adds at a position counts as part of that token
        known = torch.cat([ids.new_zeros(1), ids.flatten()])
        ngram.register_forward_pre_hook(lambda _, args: (known[args[0]], *args[1:]))
    # A tied head keeps the true embedding.
    embedding = {"wte.weight": torch.cat([weight[:1], x.flatten(0, 1)])}
    logits = functional_call(model, embedding, (numbers,), tie_weights=False)
    return x, logits, inner


def named_layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Norms, sub-layers and linear layers, however deep in containers."""
    for name, child in module.named_children():
        if isinstance(child, _CONTAINERS):
            yield from named_layers(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _share(name: str, x: Tensor, y: Tensor) -> Share:
    """Shares of the gradient of y[0, :L/2] in one random direction, with respect to x (N, L, C)."""
    half = max(1, y.shape[1] // 2)
    direction = torch.randn(y[0, :half].shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    (grad,) = torch.autograd.grad((y[0, :half] * direction.to(y.device)).sum(), x, retain_graph=True)
    total = grad.norm().clamp(min=1e-300)
    return Share(name, float(grad[0, half:].norm() / total), float(grad[1:].norm() / total))
