"""The logits of the next token of growing rows, with and without a KV cache."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

Positions = slice | Tensor
"""The positions of tokens in their sequences: a slice where all rows have the same, else (N, 1) int64."""

Decoder = Callable[[Sequence[Sequence[int]]], Tensor]
"""From N rows of tokens, each one token longer than at the last call, to the logits (N, V) of their next tokens."""


def next_token_logits(model: Any, rows: Sequence[Sequence[int]], **options: Any) -> Tensor:
    """The logits (N, V) of the token after each row of one token or more, from one forward pass over all tokens.

    Rows are padded on the right, which causal attention does not see. The options go to the forward pass.
    """
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(next(model.parameters()).device)
    last = torch.tensor([len(row) - 1 for row in rows])
    logits: Tensor = model(ids, **options)[torch.arange(len(rows)), last]
    return logits


class CachedDecoder:
    """Next-token logits of N growing rows with a KV cache: a prefill of each row, then one token per step.

    A row's context starts as its last `block_size` tokens or fewer and grows with each token. When it is full, the next
    token drops its older half, and the rest is prefilled again, from the first position. The decoder itself is the
    `cache` argument of each forward pass.

    Attributes:
        positions: of the tokens in this forward pass.
        preceding: the tokens before them, for n-grams, (N, n - 1); None where there are none.
        attn_mask: which positions each row may attend to, (N, 1, 1, positions); None for all.
    """

    positions: Positions
    preceding: Tensor | None
    attn_mask: Tensor | None

    def __init__(self, model: Any, n_rows: int) -> None:
        self.model, self.config, self.n_rows = model, model.config, n_rows
        self.device = next(model.parameters()).device
        self.start, self.length = [0] * n_rows, [0] * n_rows  # a row's context is row[start : start + length]
        # A forward pass takes 1 multiplication where a training step takes 6 operations.
        self.one_thread = n_rows * model.flops_per_token() / 6 <= ONE_THREAD_LIMIT
        self._layers: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # keys and values, each (N, H, block_size, D)
        self._computed: list[int] | slice | Tensor = slice(None)  # the rows of this forward pass
        self._longest = 0  # positions after it

    def __call__(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """The logits (N, V) of the token after each row."""
        block_size = self.config.block_size
        anew = [i for i, length in enumerate(self.length) if length in (0, block_size)]
        for i in anew:
            self.start[i] = max(0, len(rows[i]) - (block_size // 2 + 1 if self.length[i] else block_size))
        self.length = [len(row) - start for row, start in zip(rows, self.start, strict=True)]
        with one_thread() if self.one_thread else nullcontext():
            if len(anew) == len(rows):
                return self._prefill(rows, anew)
            logits = self._decode(rows)
            if anew:
                logits[anew] = self._prefill(rows, anew)
            return logits

    def _prefill(self, rows: Sequence[Sequence[int]], which: list[int]) -> Tensor:
        self._computed, self._longest = which, max(self.length[i] for i in which)
        self.positions, self.preceding, self.attn_mask = slice(self._longest), None, None
        return next_token_logits(self.model, [rows[i][self.start[i] :] for i in which], cache=self)

    def _decode(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Decode all rows, as a part of the cache would be a copy. Rows that start again are prefilled afterwards."""
        n, absent = self.config.ngram, self.config.vocab_size
        last = [row[max(start, len(row) - n) :] for row, start in zip(rows, self.start, strict=True)]
        ids = torch.tensor([[absent] * (n - len(tokens)) + list(tokens) for tokens in last], device=self.device)
        self._computed, self._longest, self.preceding = slice(None), max(self.length), ids[:, :-1]
        self.positions, self.attn_mask = slice(self._longest - 1, self._longest), None
        if min(self.length) < self._longest:
            self._computed = torch.arange(self.n_rows, device=self.device)
            self.positions = torch.tensor(self.length, device=self.device)[:, None] - 1
            self.attn_mask = (torch.arange(self._longest, device=self.device) <= self.positions)[:, None, None]
        logits: Tensor = self.model(ids[:, -1:], cache=self)
        return logits.squeeze(1)

    def update(self, layer: nn.Module, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values (n, H, L, D) of an attention layer in this forward pass.

        Returns:
            the layer's keys and values at all positions so far.
        """
        if layer not in self._layers:
            size = (self.n_rows, k.shape[1], self.config.block_size, k.shape[3])
            self._layers[layer] = k.new_zeros(size), v.new_zeros(size)
        keys, values = self._layers[layer]
        rows, at = self._computed, self.positions
        if isinstance(at, slice):
            keys[rows, :, at], values[rows, :, at] = k, v
        else:
            keys[rows, :, at[:, 0]], values[rows, :, at[:, 0]] = k[:, :, 0], v[:, :, 0]
        if k.shape[2] == self._longest:
            return k, v
        return keys[:, :, : self._longest], values[:, :, : self._longest]


ONE_THREAD_LIMIT = 2**23
"""The most multiplications in a decoding step for which one thread is used.

Threads wait for each other at every operation. When operations are this small, waiting costs about what the threads
save, and much more when other processes use the cores. A prefill is larger, but rare.
"""


@contextmanager
def one_thread() -> Iterator[None]:
    """Use a single thread for torch's operations on the CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
