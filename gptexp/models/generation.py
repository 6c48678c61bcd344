"""What drawing text takes: the logits that come after rows of tokens, and the choice of a token from them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

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
        self.model: Any = direct(model)

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
        self.model: Any = direct(model)
        self.block_size, self.ngram = model.config.block_size, model.config.ngram
        self.device = next(model.parameters()).device
        self.small = n_rows * model.flops_per_token() / 6 <= SMALL  # a multiplication is 6 of a training step's
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
        logits = self._logits(ids, slice(ids.shape[1]), self.cache.at(which, None))
        return logits[torch.arange(len(which)), last]

    def _extend(self, rows: Sequence[Sequence[int]], which: list[int]) -> Tensor:
        ids = torch.tensor([[rows[i][-1]] for i in which], device=self.device)
        places = [self.count[i] - 1 for i in which]
        at: At = slice(places[0], places[0] + 1)
        if places.count(places[0]) < len(places):
            at = torch.tensor(places, device=self.device)[:, None]
        place = self.cache.at(which, at)
        if self.ngram > 1:
            before = [self._before(rows[i], self.first[i]) for i in which]
            place = place._replace(before=torch.tensor(before, device=self.device))
        return self._logits(ids, at, place).squeeze(1)

    def _before(self, row: Sequence[int], first: int) -> list[int]:
        """The tokens of the context before a row's last one that n-grams see; V where there are none."""
        known = list(row[max(first, len(row) - self.ngram) : -1])
        return [self.model.config.vocab_size] * (self.ngram - 1 - len(known)) + known

    def _logits(self, ids: Tensor, at: At, place: "Place") -> Tensor:
        with one_thread() if self.small else nullcontext():
            logits: Tensor = self.model.extend(ids, at, place)
        return logits


SMALL = 2**23
"""The most multiplications of a step whose sampling is done by one thread.

Threads wait for each other at every operation: where the operations are so small, for about as long as they save, and
for much longer where others use the cores. What begins anew is larger, but seldom.
"""


@contextmanager
def one_thread() -> Iterator[None]:
    """A single thread for torch's operations on the CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Cache:
    """The keys and values of attention layers, for the positions that rows have.

    Args:
        n_rows: N.
        positions: P, the most that a row can have.
    """

    def __init__(self, n_rows: int, positions: int) -> None:
        self.n_rows, self.positions = n_rows, positions
        self.layers: dict[nn.Module, Kept] = {}

    def at(self, rows: list[int], at: At | None) -> "Place":
        """A place in it.

        Args:
            rows: which ones.
            at: each row's next position; None where the rows begin anew with whatever comes.
        """
        return Place(self, None if len(rows) == self.n_rows else torch.tensor(rows), at)


class Kept:
    """The keys and values (N, H, P, D) of a layer, and the views of them that steps have taken, to be taken again."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.views: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def at(self, position: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All rows' key and value at a position (N, H, 1, D), and those up to it (N, H, position + 1, D)."""
        if position not in self.views:
            (key, keys), (value, values) = (
                (kept[:, :, position : position + 1], kept[:, :, : position + 1]) for kept in (self.keys, self.values)
            )
            self.views[position] = key, value, keys, values
        return self.views[position]


class Place(NamedTuple):
    """Rows of a cache, all of them or some, where they go on, and the few tokens before that n-grams see (n, k)."""

    cache: Cache
    rows: Tensor | None
    at: At | None
    before: Tensor | None = None

    def extend(self, layer: nn.Module, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keep a layer's keys and values (n, H, L, D).

        Returns:
            those of all positions so far, and which of them each row has: None for all, or (n, 1, 1, positions).
        """
        cache, rows, at, _ = self
        kept = cache.layers.get(layer)
        if kept is None:
            size = (cache.n_rows, k.shape[1], cache.positions, k.shape[3])
            kept = cache.layers[layer] = Kept(k.new_zeros(size), v.new_zeros(size))
        if rows is None and isinstance(at, slice):
            key, value, keys, values = kept.at(at.start)
            key.copy_(k)
            value.copy_(v)
            return keys, values, None
        keys, values, some = kept.keys, kept.values, slice(None) if rows is None else rows
        if at is None:
            keys[some, :, : k.shape[2]], values[some, :, : k.shape[2]] = k, v
            return k, v, None
        if isinstance(at, slice):
            keys[some, :, at], values[some, :, at] = k, v
            return keys[some, :, : at.stop], values[some, :, : at.stop], None
        which = torch.arange(cache.n_rows, device=at.device)[some if rows is None else rows.to(at.device)]
        keys[which, :, at[:, 0]], values[which, :, at[:, 0]] = k[:, :, 0], v[:, :, 0]
        stop = int(at.max()) + 1
        known = torch.arange(stop, device=at.device) <= at  # (n, stop)
        return keys[some, :, :stop], values[some, :, :stop], known[:, None, None]


def direct(module: Any) -> Any:
    """The same module on a shorter way: it shares the tensors, and to call a part is to call its `forward`.

    nn.Module looks for hooks at each call, and for its parameters and parts only after all other attributes, which for
    a single position takes as long as a small model's arithmetic. Modules with hooks or with a `forward` of their own,
    and those of classes from elsewhere than torch or this package, stay as they are.
    """
    kind: Any = type(module)
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) or _has_any_global_hook()
    if hooked or not kind.__module__.startswith(("gptexp.models.", "torch.nn.modules.")):
        return module
    twin = object.__new__(_direct(kind))
    parts = {name: part if part is None else direct(part) for name, part in module._modules.items()}
    vars(twin).update({**vars(module), **module._parameters, **module._buffers, **parts, "_modules": parts})
    return twin


@cache
def _direct(kind: Any) -> Any:
    return type(kind.__name__, (kind,), {"__call__": kind.forward})


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
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probs = (ordered / temperature).softmax(-1, dtype=torch.float64)  # where chance * end, rounded, is less than end
    if top_k is not None:
        probs, order = probs[:, :top_k], order[:, :top_k]
    total = probs.cumsum(-1)
    end = total[:, -1:]
    if top_p is not None:  # a token stays while those before it do not reach p
        end = total.gather(-1, (total[:, :-1] < top_p).sum(-1, keepdim=True))
    pick = torch.searchsorted(total, chance.unsqueeze(-1) * end, right=True)
    return order.gather(-1, pick).squeeze(-1)
