"""Batches as a pure function of (seed, step): nothing to save or restore, and every variant sees the same ones.

Ids are split into a training and a validation part. Each part is cut into rows of one width L: windows of running text,
or one document each. A row is a pair x, y (L,) int64, where y[i] follows x[i].
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gptexp.data.tokenizers import Tokenizer

BATCH_STREAM = 0  # rows of the training batches
SPLIT_STREAM = 1  # the shuffle of the documents
IGNORED = -1  # in y, where there is no target

Indices = NDArray[np.int64]


class Batch(NamedTuple):
    """Rows for the model: arrays of numpy here, tensors of torch from the data module.

    Attributes:
        x: (rows, L) int64; 0 where padded.
        y: (rows, L) int64, what follows x; -1 where padded.
        mask: (rows, L) bool, False where padded, or where a statistic over a batch should not count; None where nothing
            is.
        tokens: in evaluation, the number of targets in these rows. In training, the number in the whole batch of the
            step; the data module divides it by processes * micro-batches. The sum of a batch's losses is divided by it,
            so that the mean that Lightning takes over processes and micro-batches is the mean over all targets.
        whole: False in an evaluation on some windows of the validation split alone.
    """

    x: Any
    y: Any
    mask: Any
    tokens: float
    whole: bool = True


def draw(seed: int, step: int, count: int, n: int, stream: int = BATCH_STREAM) -> Indices:
    """`count` numbers from 0 .. n - 1, uniform and with repetition; a pure function of the arguments."""
    return (random_numbers(seed, step, count, stream) % np.uint64(n)).astype(np.int64)


def random_numbers(seed: int, step: int, count: int, stream: int) -> NDArray[np.uint64]:
    """`count` numbers of 64 random bits; a pure function of the arguments.

    Philox (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3") turns a key, here (seed, stream), and a
    counter into random bits. The step is the counter's highest word and counting starts at the lowest, so steps never
    share numbers. Its raw output is the same in every version of numpy, unlike that of `Generator`.
    """
    counter = np.array([0, 0, 0, step], np.uint64)
    bits = np.random.Philox(key=np.array([seed, stream], np.uint64), counter=counter)
    return np.asarray(bits.random_raw(count), np.uint64)


def part_for_training(n: int, val_fraction: float) -> int:
    """n (1 - val_fraction), rounded down; the inner rounding is for products such as 10 * (1 - 0.9) = 0.999..."""
    return int(round(n * (1 - val_fraction), 4))


class Split(ABC):
    """The training or the validation part of a corpus: rows of `width` positions that are cut out of its ids.

    Attributes:
        n_rows: number of rows that hold each target of the split exactly once.
        n_tokens: number of targets in those rows.
        masked: whether a batch has a mask even if nothing in it is padded.
    """

    n_rows: int
    n_tokens: int
    masked = False

    def __init__(self, ids: NDArray[Any], width: int) -> None:
        self._ids = ids.view(np.ndarray)  # a plain view of the memory map is faster to index
        self.width = width

    @abstractmethod
    def train_batch(self, seed: int, step: int, batch_size: int, rows: slice = slice(None)) -> Batch:
        """The rows `rows` of the random batch of `batch_size` rows at (seed, step)."""

    @abstractmethod
    def find(self, numbers: Indices) -> tuple[Indices, Indices]:
        """Where in the ids these rows begin, and how many targets each has."""

    def rows(self, indices: ArrayLike) -> Batch:
        """Rows by number, 0 .. n_rows - 1; the number -1 gives a row of padding."""
        numbers = np.asarray(indices, np.int64)
        starts, lengths = self.find(np.maximum(numbers, 0))
        return self._cut(starts, np.where(numbers < 0, 0, lengths))

    def _cut(self, starts: Indices, lengths: Indices) -> Batch:
        window = self._window(starts, lengths)
        x, y = window[:, :-1].copy(), window[:, 1:].copy()  # copies: padding one must not change the other
        mask = None
        if self.masked or (lengths < self.width).any():
            mask = np.arange(self.width) < lengths[:, None]
            x[~mask], y[~mask] = 0, IGNORED
        return Batch(x, y, mask, float(lengths.sum()))

    def _window(self, starts: Indices, lengths: Indices) -> Indices:
        """The ids of rows, each with the id that follows it: (rows, L + 1)."""
        at = starts[:, None] + np.arange(self.width + 1)
        return np.take(self._ids, at, mode="clip").astype(np.int64)


class Windows(Split):
    """Running text: the part ids[start:stop], in windows of `width` targets.

    The rows 0 .. n_rows - 1 do not overlap and have every id of the part as a target once; the last row is padded. The
    context of the first target is the id before the part, without which it is not a target.
    """

    def __init__(self, ids: NDArray[Any], start: int, stop: int, width: int) -> None:
        super().__init__(ids, width)
        self._start, self._stop = start, stop
        self._first_target = max(start, 1)
        self.n_tokens = stop - self._first_target
        self.n_rows = -(-self.n_tokens // width)

    def train_batch(self, seed: int, step: int, batch_size: int, rows: slice = slice(None)) -> Batch:
        """Windows that begin anywhere and lie inside the part."""
        starts = self._start + draw(seed, step, batch_size, self._stop - self._start - self.width)[rows]
        return self._cut(starts, np.full_like(starts, self.width))._replace(tokens=float(batch_size * self.width))

    def find(self, numbers: Indices) -> tuple[Indices, Indices]:
        """As its base."""
        starts = self._first_target - 1 + numbers * self.width
        return starts, np.minimum(self._stop - 1 - starts, self.width)


class Documents(Split):
    """One document per row: x = terminator, c1 .. cn and y = c1 .. cn, terminator, both padded to `width`.

    Args:
        ids: of the whole corpus.
        starts: (documents,) where each document of the part begins in `ids`.
        lengths: (documents,) number of ids of each, without the terminator.
        width: L; at least the longest length + 1.
        terminator: the id that opens and closes a document.
    """

    masked = True

    def __init__(
        self, ids: NDArray[Any], starts: Indices, lengths: Indices, *, width: int, terminator: int
    ) -> None:
        super().__init__(ids, width)
        self._starts, self._lengths, self._terminator = starts - 1, lengths + 1, terminator  # the terminators included
        self.n_rows = len(starts)
        self.n_tokens = int(self._lengths.sum())

    def train_batch(self, seed: int, step: int, batch_size: int, rows: slice = slice(None)) -> Batch:
        """Documents drawn at random, with repetition."""
        numbers = draw(seed, step, batch_size, self.n_rows)
        return self.rows(numbers[rows])._replace(tokens=float(self._lengths[numbers].sum()))

    def find(self, numbers: Indices) -> tuple[Indices, Indices]:
        """As its base."""
        return self._starts[numbers], self._lengths[numbers]

    def _window(self, starts: Indices, lengths: Indices) -> Indices:
        window = super()._window(starts, lengths)
        window[:, 0] = window[np.arange(len(lengths)), lengths] = self._terminator  # a file may lack its first and last
        return window


class Contexts(Documents):
    """One target per row, the last position, after as many ids of its document as fit; before them, the terminator.

    The other positions are in the mask as padding is, so that statistics over a batch count each row once.

    Args:
        ids: of the whole corpus.
        starts: (documents,) where each document of the part begins in `ids`.
        lengths: (documents,) number of ids of each, without the terminator.
        width: L, the number of ids from which one is predicted.
        terminator: the id that opens and closes a document.
    """

    def __init__(
        self, ids: NDArray[Any], starts: Indices, lengths: Indices, *, width: int, terminator: int
    ) -> None:
        super().__init__(ids, starts, lengths, width=width, terminator=terminator)
        self._ends = np.cumsum(self._lengths)  # of each document, in the numbers of rows
        self.n_rows = self.n_tokens

    def train_batch(self, seed: int, step: int, batch_size: int, rows: slice = slice(None)) -> Batch:
        """Targets drawn at random, with repetition."""
        numbers = draw(seed, step, batch_size, self.n_rows)
        return self.rows(numbers[rows])._replace(tokens=float(batch_size))

    def rows(self, indices: ArrayLike) -> Batch:
        """As its base."""
        numbers = np.asarray(indices, np.int64)
        which = np.maximum(numbers, 0)
        document = np.searchsorted(self._ends, which, "right")
        start, end = self._starts[document], self._starts[document] + self._lengths[document]
        target = end - (self._ends[document] - which) + 1
        at = target[:, None] + np.arange(-self.width, 1)
        window = np.take(self._ids, at, mode="clip").astype(np.int64)
        window[(at <= start[:, None]) | (at >= end[:, None])] = self._terminator
        mask = np.zeros((len(numbers), self.width), bool)
        mask[:, -1] = numbers >= 0
        x, y = window[:, :-1].copy(), np.where(mask, window[:, 1:], IGNORED)
        x[numbers < 0] = 0
        return Batch(x, y, mask, float(mask.sum()))


def chars_per_token(split: Split, tokenizer: Tokenizer) -> float:
    """Characters of text for each target of a split; nats per target / ln 2 / this = bits per character."""
    if tokenizer.one_per_character:
        return 1.0
    characters = 0
    for begin in range(0, split.n_rows, 2**13):
        y = split.rows(np.arange(begin, min(begin + 2**13, split.n_rows))).y
        characters += tokenizer.characters(y[y != IGNORED])
    return characters / split.n_tokens
