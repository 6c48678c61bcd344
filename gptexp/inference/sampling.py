"""The choice of a token from logits."""

import torch
from torch import Tensor


def sample_tokens(
    logits: Tensor, uniform: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> Tensor:
    """Sample one token per row by inverting the cumulative distribution, the likeliest tokens first.

    Args:
        logits: (N, V).
        uniform: (N,), random numbers in [0, 1), one for each row.
        temperature, top_k, top_p: see `LanguageModel.stream`.

    Returns:
        token ids (N,).
    """
    if temperature == 0:
        return logits.argmax(-1)
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probs = (ordered / temperature).softmax(-1, dtype=torch.float64)  # where uniform * end rounds to less than end
    if top_k is not None:
        probs, order = probs[:, :top_k], order[:, :top_k]
    total = probs.cumsum(-1)
    end = total[:, -1:]
    if top_p is not None:  # a token stays while those before it do not reach p
        end = total.gather(-1, (total[:, :-1] < top_p).sum(-1, keepdim=True))
    pick = torch.searchsorted(total, uniform.unsqueeze(-1) * end, right=True)
    return order.gather(-1, pick).squeeze(-1)
