"""What drawing text takes: the logits that come after rows of tokens, and the choice of a token from them."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

At = slice | Tensor
"""Which positions of a context: the same for all rows, or (n, 1) for each."""


class Reader(Protocol):
    """Reads rows of tokens that grow by one token a step."""

    def read(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """The logits after each row's last token, (N, V)."""


class WindowReader:
    """Each step computes the last `block_size` tokens of every row anew.

    Args:
        model: any model of ids (N, L), mask.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def read(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """The logits after each row's last token, (N, V)."""
        ids, last = padded([row[-self.model.config.block_size :] for row in rows], self.model)
        logits: Tensor = self.model(ids)[torch.arange(len(rows)), last]
        return logits


class CachedReader:
    """Each step computes one new position a row, with the keys and values that earlier steps have left.

    A row's context begins with its last `block_size` tokens and grows with each token. Once it holds `block_size`, the
    next token drops its older half, and the rest is encoded anew, at the first positions.

    Args:
        model: a GPT.
        n_rows: N.
    """

    def __init__(self, model: Any, n_rows: int) -> None:
        self.model, self.block_size = model, model.config.block_size
        self.cache = Cache(n_rows, self.block_size)
        self.first, self.count = [0] * n_rows, [0] * n_rows  # a row's context is row[first : first + count]

    def read(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """The logits after each row's last token, (N, V)."""
        anew = [i for i, count in enumerate(self.count) if count in (0, self.block_size)]
        going = [i for i, count in enumerate(self.count) if count not in (0, self.block_size)]
        for i in anew:
            wanted = self.block_size // 2 + 1 if self.count[i] else self.block_size
            self.first[i] = max(0, len(rows[i]) - wanted)
        self.count = [len(row) - first for row, first in zip(rows, self.first, strict=True)]
        if not going:
            return self._encode(rows, anew)
        logits = self._extend(rows, going)
        if not anew:
            return logits
        order = torch.tensor([*going, *anew]).argsort()
        return torch.cat([logits, self._encode(rows, anew)])[order]

    def _encode(self, rows: Sequence[Sequence[int]], which: list[int]) -> Tensor:
        ids, last = padded([rows[i][self.first[i] :] for i in which], self.model)
        logits: Tensor = self.model.extend(ids, slice(ids.shape[1]), self.cache.at(which, None))
        return logits[torch.arange(len(which)), last]

    def _extend(self, rows: Sequence[Sequence[int]], which: list[int]) -> Tensor:
        device = next(self.model.parameters()).device
        ids = torch.tensor([[rows[i][-1]] for i in which], device=device)
        places = [self.count[i] - 1 for i in which]
        same = len(set(places)) == 1
        at: At = slice(places[0], places[0] + 1) if same else torch.tensor(places, device=device)[:, None]
        place = self.cache.at(which, at)
        if self.model.config.ngram > 1:
            before = [self._before(rows[i], self.first[i]) for i in which]
            place = place._replace(before=torch.tensor(before, device=device))
        logits: Tensor = self.model.extend(ids, at, place)[:, -1]
        return logits


    def _before(self, row: Sequence[int], first: int) -> list[int]:
        """The tokens of the context before a row's last one that n-grams see; V where there are none."""
        n = self.model.config.ngram - 1
        known = list(row[max(first, len(row) - 1 - n) : -1])
        return [self.model.config.vocab_size] * (n - len(known)) + known


class Cache:
    """The keys and values of attention layers, for the positions that rows have.

    Args:
        n_rows: N.
        positions: P, the most that a row can have.
    """

    def __init__(self, n_rows: int, positions: int) -> None:
        self.n_rows, self.positions = n_rows, positions
        self.layers: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # (N, H, P, D) each

    def at(self, rows: list[int], at: At | None) -> "Place":
        """A place in it.

        Args:
            rows: which ones.
            at: each row's next position; None where the rows begin anew with whatever comes.
        """
        return Place(self, slice(None) if len(rows) == self.n_rows else torch.tensor(rows), at)


class Place(NamedTuple):
    """Rows of a cache, the position at which they go on, and the few tokens before it that n-grams see (n, k)."""

    cache: Cache
    rows: slice | Tensor
    at: At | None
    before: Tensor | None = None

    def extend(self, layer: nn.Module, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keep a layer's keys and values (n, H, L, D).

        Returns:
            those of all positions so far, and which of them each row has: None for all, or (n, 1, 1, positions).
        """
        cache, rows, at, _ = self
        if layer not in cache.layers:
            size = (cache.n_rows, k.shape[1], cache.positions, k.shape[3])
            cache.layers[layer] = k.new_zeros(size), v.new_zeros(size)
        keys, values = cache.layers[layer]
        if at is None:
            keys[rows, :, : k.shape[2]], values[rows, :, : k.shape[2]] = k, v
            return k, v, None
        if isinstance(at, slice):
            keys[rows, :, at], values[rows, :, at] = k, v
            return keys[rows, :, : at.stop], values[rows, :, : at.stop], None
        which = torch.arange(cache.n_rows, device=at.device)[rows.to(at.device) if isinstance(rows, Tensor) else rows]
        keys[which, :, at[:, 0]], values[which, :, at[:, 0]] = k[:, :, 0], v[:, :, 0]
        stop = int(at.max()) + 1
        known = torch.arange(stop, device=at.device) <= at  # (n, stop)
        return keys[rows, :, :stop], values[rows, :, :stop], known[:, None, None]


def padded(rows: Sequence[Sequence[int]], model: nn.Module) -> tuple[Tensor, Tensor]:
    """Rows as one tensor, padded at the right, where causal attention never looks from the left.

    Returns:
        ids (n, L) int64 on the model's device, and the number (n,) of each row's last position.
    """
    last = torch.tensor([len(row) - 1 for row in rows])
    ids = torch.zeros(len(rows), int(last.max()) + 1, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids.to(next(model.parameters()).device), last


def choose(logits: Tensor, chance: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Pick one id a row from logits (N, V) with the uniform numbers chance (N,) in [0, 1). Returns (N,)."""
    if temperature == 0:
        return logits.argmax(-1)
    probs, order = torch.sort((logits / temperature).softmax(-1), dim=-1, descending=True, stable=True)
    if top_k is not None:
        probs[:, top_k:] = 0.0
    total = probs.cumsum(-1)
    if top_p is not None:
        probs[:, 1:] *= total[:, :-1] < top_p  # a token stays while those before it do not reach p
        total = probs.cumsum(-1)
    pick = torch.searchsorted(total, chance[:, None] * total[:, -1:], right=True)
    # Rounding can take the last bound to or below the chance.
    pick = torch.minimum(pick, (probs > 0).sum(-1, keepdim=True) - 1)
    return order.gather(-1, pick).squeeze(-1)
