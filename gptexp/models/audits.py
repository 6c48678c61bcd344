"""What a model's output depends on, and how far train mode and eval mode lie apart, by the model itself in float64.

Two questions of any variant, answered by gradients: does the output at position t depend on a later token (then a
training loss that is computed so sees what it is to predict), and does it depend on another sequence of the batch?
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from gptexp.models.gpt import Block, Residual
from gptexp.models.language_model import LanguageModel
from gptexp.models.settings import build_model

NEGLIGIBLE = 1e-9
"""A share of the gradient below this is rounding."""

NEW_TOKENS = 16  # that are compared between a row alone and the same row in a batch

_CONTAINERS = (LanguageModel, nn.ModuleList, Block, Residual)


@dataclass(frozen=True)
class Share:
    """Where the gradient of one part's output at the first positions of one sequence goes, as shares of its norm."""

    part: str  # name of the layer, or "model"
    future: float  # to later positions of the same sequence
    others: float  # to the other sequences of the batch

    @property
    def looks_ahead(self) -> bool:
        """Whether the output depends on later positions of its own sequence."""
        return self.future > NEGLIGIBLE

    @property
    def couples(self) -> bool:
        """Whether the output depends on other sequences of the batch."""
        return self.others > NEGLIGIBLE


@dataclass(frozen=True)
class Influence:
    """How far each token reaches."""

    map: Tensor  # (L, L), about |d logits[0, t] / d x[0, s]| at row t and column s, with x the embedded tokens
    others: Tensor  # (L, L), the same for |d logits[0, t] / d x[n, s]|, over all other sequences n
    model: Share  # the whole model's shares
    parts: list[Share]  # those of its layers, in the order in which data meets them


def measure(model: LanguageModel, ids: Tensor, training: bool) -> Influence:
    """Measure a model in train mode or in eval mode, without dropout, by ids (N, L) int64, N at least 2.

    |J| of each Jacobian J is estimated by one random direction v of the logits: |v J|^2 has the mean |J|^2. The model
    itself, on any device and in any precision, stays as it is.

    Raises:
        ValueError: when the model cannot be trained on such a batch.
    """
    model = prepared(model, training)
    L = ids.shape[1]
    x, logits, inner = _trace(model, ids.to(model.wte.weight.device))
    directions = torch.randn(logits.shape[1:], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    directions = directions.to(logits.device)
    own, others = torch.zeros(L, L, dtype=torch.float64), torch.zeros(L, L, dtype=torch.float64)
    for t in range(L):
        (grad,) = torch.autograd.grad(logits[0, t] @ directions[t], x, retain_graph=True)
        reach = grad.square().sum(-1).cpu()  # (N, L)
        own[t], others[t] = reach[0].sqrt(), reach[1:].sum(0).sqrt()
    total = (own.square().sum() + others.square().sum()).sqrt().clamp(min=1e-300)
    whole = Share("model", float(own.triu(1).norm() / total), float(others.norm() / total))
    return Influence(own, others, whole, [_share(name, a, y) for name, a, y in inner])


def train_mode(config: Any) -> Share:
    """What the training loss of this model's configuration depends on, told from a model of its first two layers."""
    small = replace(config, n_layer=min(2, config.n_layer)) if hasattr(config, "n_layer") else config
    model = prepared(build_model(small), training=True)
    shape = (4, min(8, config.block_size))
    x, logits, _ = _trace(model, torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0)))
    return _share("model", x, logits)


def prepared(model: LanguageModel, training: bool) -> Any:
    """A copy in float64 without dropout and approximate gradients, in train or in eval mode."""
    model = copy.deepcopy(model).double().train(training)
    for module in model.modules():
        if hasattr(module, "exact_gradient"):
            module.exact_gradient = True  # type: ignore[assignment]
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
    numbers = torch.arange(1, ids.numel() + 1, device=ids.device).view(ids.shape)  # 0 stands for what is no token
    ngram = getattr(model, "ngram", None)
    if ngram is not None:  # looks up the true tokens; what it adds at a position counts as that position's token
        known = torch.cat([ids.new_zeros(1), ids.flatten()])
        ngram.register_forward_pre_hook(lambda _, args: (known[args[0]], *args[1:]))
    # A tied head keeps the true embedding.
    embedding = {"wte.weight": torch.cat([weight[:1], x.flatten(0, 1)])}
    logits = functional_call(model, embedding, (numbers,), tie_weights=False)
    return x, logits, inner


def named_layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Norms, sub-layers and linear maps, however deep in containers."""
    for name, child in module.named_children():
        if isinstance(child, _CONTAINERS):
            yield from named_layers(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _share(name: str, x: Tensor, y: Tensor) -> Share:
    """Shares of the gradient of y[0, :L/2], in one random direction, with respect to x (N, L, C)."""
    half = max(1, y.shape[1] // 2)
    direction = torch.randn(y[0, :half].shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    (grad,) = torch.autograd.grad((y[0, :half] * direction.to(y.device)).sum(), x, retain_graph=True)
    total = grad.norm().clamp(min=1e-300)
    return Share(name, float(grad[0, half:].norm() / total), float(grad[1:].norm() / total))


@torch.no_grad()
def between_modes(
    model: LanguageModel, batches: list[tuple[Tensor, Tensor, Tensor | None]], prompt: Tensor
) -> dict[str, Any]:
    """Loss, generation and statistics of both modes, without dropout; the model stays as it is.

    Only norms with statistics of a batch make them differ.

    Args:
        model: to be measured.
        batches: of ids (N, L) int64, targets (N, L), -1 at padding, and mask, None or (N, L).
        prompt: (N, L) int64; its first row is continued alone and together with the others.

    Returns:
        loss: by mode, nats a token over the batches.
        generation: by mode, the first of 16 greedy tokens at which the row continued alone and the same row continued
            in the batch differ; None where they do not.
        discrepancy: for each norm with running statistics, their distance from the first batch's: `layer`,
            `mean_drift` and `std_drift`.

        Where a mode is impossible, as some statistics of a batch of one are, the reason stands in place of the number.
    """
    losses, generation = {}, {}
    for mode in ("train", "eval"):
        losses[mode] = _or_reason(_loss, prepared(model, mode == "train"), batches)
        generation[mode] = _or_reason(_first_difference, model, mode == "train", prompt)
    return {"loss": losses, "generation": generation, "discrepancy": _discrepancies(model, batches[0])}


def _or_reason(measure: Any, *arguments: Any) -> Any:
    try:
        return measure(*arguments)
    except ValueError as error:
        return str(error)


def _loss(model: LanguageModel, batches: list[tuple[Tensor, Tensor, Tensor | None]]) -> float:
    total, count = 0.0, 0
    for ids, targets, mask in batches:
        logits = model(ids, mask if model.training else None)
        total += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum"))
        count += int((targets >= 0).sum())
    return total / count


def _first_difference(model: LanguageModel, training: bool, prompt: Tensor) -> int | None:
    alone = _greedy(prepared(model, training), prompt[:1])[0]
    together = _greedy(prepared(model, training), prompt)[0]
    different = (alone != together).nonzero()
    return int(different[0]) if len(different) else None


def _greedy(model: LanguageModel, ids: Tensor) -> Tensor:
    """The next 16 tokens of each row (N, L): (N, 16), in the mode that the model is in."""
    for _ in range(NEW_TOKENS):
        logits = model(ids[:, -model.config.block_size :])[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids[:, -NEW_TOKENS:]


def _discrepancies(model: LanguageModel, batch: tuple[Tensor, Tensor, Tensor | None]) -> list[dict[str, Any]]:
    model = prepared(model, training=True)
    found: list[dict[str, Any]] = []
    for name, layer in named_layers(model):
        if hasattr(layer, "discrepancy"):  # before the batch moves the running averages
            layer.register_forward_pre_hook(
                lambda norm, args, name=name: found.append({"layer": name, **norm.discrepancy(*args)})
            )
    try:
        model(batch[0], batch[2])
    except ValueError:  # a batch too small for its norm
        return []
    return found
