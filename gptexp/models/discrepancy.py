"""How far a model in train mode and the same model in eval mode lie apart; only norms with statistics differ."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gptexp.models.influence import named_layers, prepared
from gptexp.models.language_model import LanguageModel

NEW_TOKENS = 16


@torch.no_grad()
def between_modes(
    model: LanguageModel, batches: list[tuple[Tensor, Tensor, Tensor | None]], prompt: Tensor
) -> dict[str, Any]:
    """Loss, generation and statistics of both modes, without dropout, in float64; the model stays as it is.

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

    def note(norm: Any, args: tuple[Any, ...]) -> None:  # before the batch moves the running averages
        found.append({"layer": names[norm], **norm.discrepancy(*args)})

    names = {layer: name for name, layer in named_layers(model) if hasattr(layer, "discrepancy")}
    for layer in names:
        layer.register_forward_pre_hook(note)
    try:
        model(batch[0], batch[2])
    except ValueError:  # a batch too small for its norm
        return []
    return found
