"""How much a model's train mode and eval mode differ, measured on the model itself in float64.

Only norms with statistics of a batch make them differ.
"""

from typing import Any

import torch
from torch import Tensor

from gptexp.audits.influence import named_layers, prepared
from gptexp.models.language_model import LanguageModel
from gptexp.models.norms import BatchStatistics
from gptexp.tasks.metrics import summed_loss

NEW_TOKENS = 16  # compared between a row alone and the same row in a batch

Batches = list[tuple[Tensor, Tensor, Tensor | None]]
"""Of ids (N, L) int64, targets (N, L), -1 at padding, and mask, None or (N, L)."""


@torch.no_grad()
def between_modes(model: LanguageModel, batches: Batches, prompt: Tensor) -> dict[str, Any]:
    """Loss, generation and statistics in both modes, without dropout; the model is not changed.

    Args:
        model: to be measured.
        batches: to take the loss of.
        prompt: (N, L) int64; its first row is continued alone and together with the others.

    Returns:
        loss: by mode, nats per token over the batches.
        generation: by mode, the first of 16 greedy tokens at which the row continued alone and the same row continued
            in the batch differ; None where they do not.
        discrepancy: for each norm with running statistics, their distance from the first batch's: `layer`,
            `mean_drift` and `std_drift`.

        Where a mode is impossible, such as some statistics of a batch of one, the reason replaces the number.
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


def _loss(model: LanguageModel, batches: Batches) -> float:
    total, count = 0.0, 0
    for ids, targets, mask in batches:
        total += float(summed_loss(model(ids, mask if model.training else None), targets))
        count += int((targets >= 0).sum())
    return total / count


def _first_difference(model: LanguageModel, training: bool, prompt: Tensor) -> int | None:
    alone, together = (_greedy(prepared(model, training), ids)[0] for ids in (prompt[:1], prompt))
    different = (alone != together).nonzero()
    return int(different[0]) if len(different) else None


def _greedy(model: LanguageModel, ids: Tensor) -> Tensor:
    """The next 16 tokens of each row (N, L): (N, 16), in the model's present mode."""
    for _ in range(NEW_TOKENS):
        logits = model(ids[:, -model.config.block_size :])[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids[:, -NEW_TOKENS:]


def _discrepancies(model: LanguageModel, batch: tuple[Tensor, Tensor, Tensor | None]) -> list[dict[str, Any]]:
    model = prepared(model, training=True)
    found: list[dict[str, Any]] = []
    for name, layer in named_layers(model):
        if isinstance(layer, BatchStatistics):  # before the batch moves the running averages
            layer.register_forward_pre_hook(
                lambda norm, args, name=name: found.append({"layer": name, **norm.discrepancy(*args)})
            )
    try:
        model(batch[0], batch[2])
    except ValueError:  # a batch too small for its norm
        return []
    return found
