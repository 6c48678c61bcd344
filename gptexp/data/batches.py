"""Batches as a pure function of (seed, step): nothing to save, nothing to restore, every variant sees the same.

Ids are split into a training and a validation part, and each part is cut into rows of one width L: windows
of running text, or one document each. A row is a pair x, y (L,) int64, where y[i] is what follows x[i].
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gptexp.data.encoded import Encoded
from gptexp.data.settings import DataConfig
from gptexp.data.tokenizer import ByteTokenizer, Tokenizer
from gptexp.errors import UserError

BATCH_STREAM = 0  # rows of the training batches
SPLIT_STREAM = 1  # the shuffle of the documents
IGNORED = -1  # in y: no target here
SCAN = 2**24  # ids looked at in one go where all of them have to be

Indices = NDArray[np.int64]


class Batch(NamedTuple):
    """Rows for the model: arrays of numpy here, tensors of torch from the data module.

    Attributes:
        x: (rows, L) int64; 0 where padded.
        y: (rows, L) int64, what follows x; -1 where padded.
        mask: (rows, L) bool, y >= 0; None where nothing is padded.
        tokens: in evaluation, number of targets in these rows. In training, that of the whole batch of the step,
            whichever rows of it these are; from the data module, over processes * micro-batches. So where the sum of a
            batch's losses is divided by it, the mean over processes and micro-batches, which is Lightning's to take,
            is the mean over all targets of the step.
        whole: False in an evaluation that sees only some windows of the validation split.
    """

    x: Any
    y: Any
    mask: Any
    tokens: float
    whole: bool = True


def draw(seed: int, step: int, count: int, n: int, stream: int = BATCH_STREAM) -> Indices:
    """`count` numbers from 0 .. n - 1, uniform and with repetition; a pure function of the arguments.

    Philox (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3") turns a key, here (seed, stream),
    and a counter into random bits. The step is the counter's highest word and counting starts at the
    lowest, so steps never share numbers. Raw 64-bit output is stable across versions of numpy, unlike
    what `Generator` makes of it; modulo n is uniform to within n / 2**64.
    """
    return (_raw(seed, step, count, stream) % np.uint64(n)).astype(np.int64)


def _raw(seed: int, step: int, count: int, stream: int) -> NDArray[np.uint64]:
    counter = np.array([0, 0, 0, step], np.uint64)
    bits = np.random.Philox(key=np.array([seed, stream], np.uint64), counter=counter)
    return np.asarray(bits.random_raw(count), np.uint64)


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
        self._ids = ids.view(np.ndarray)  # a plain view of the map is quicker to index
        self.width = width

    @abstractmethod
    def train_batch(self, seed: int, step: int, batch_size: int, rows: slice = slice(None)) -> Batch:
        """The rows `rows` of the batch of `batch_size` rows, drawn at random, that (seed, step) stand for."""

    @abstractmethod
    def _find(self, numbers: Indices) -> tuple[Indices, Indices]:
        """Where in the ids some rows begin, and how many targets each has."""

    def rows(self, indices: ArrayLike) -> Batch:
        """Rows by number, 0 .. n_rows - 1; the number -1 gives a row of nothing but padding."""
        numbers = np.asarray(indices, np.int64)
        starts, lengths = self._find(np.maximum(numbers, 0))
        return self._cut(starts, np.where(numbers < 0, 0, lengths))

    def _cut(self, starts: Indices, lengths: Indices) -> Batch:
        window = self._window(starts, lengths)
        x, y = window[:, :-1].copy(), window[:, 1:].copy()  # copies, as padding one must not touch the other
        mask = None
        if self.masked or (lengths < self.width).any():
            mask = np.arange(self.width) < lengths[:, None]
            x[~mask], y[~mask] = 0, IGNORED
        return Batch(x, y, mask, float(lengths.sum()))

    def _window(self, starts: Indices, lengths: Indices) -> Indices:
        """The ids of rows and the one that follows them: (rows, L + 1)."""
        at = starts[:, None] + np.arange(self.width + 1)
        return np.take(self._ids, at, mode="clip").astype(np.int64)


class Windows(Split):
    """Running text: the part ids[start:stop], in windows of `width` targets.

    The rows 0 .. n_rows - 1 do not overlap and have every id of the part as a target once, the last row
    padded. The first target's context is the id before the part; where there is none it is no target.
    """

    def __init__(self, ids: NDArray[Any], start: int, stop: int, width: int) -> None:
        super().__init__(ids, width)
        self._start, self._stop = start, stop
        self._first_target = max(start, 1)
        self.n_tokens = stop - self._first_target
        self.n_rows = -(-self.n_tokens // width)

    def train_batch(self, seed: int, step: int, batch_size: int, rows: slice = slice(None)) -> Batch:
        """Windows that begin anywhere, so that they lie wholly inside the part."""
        starts = self._start + draw(seed, step, batch_size, self._stop - self._start - self.width)[rows]
        return self._cut(starts, np.full_like(starts, self.width))._replace(tokens=float(batch_size * self.width))

    def _find(self, numbers: Indices) -> tuple[Indices, Indices]:
        starts = self._first_target - 1 + numbers * self.width
        return starts, np.minimum(self._stop - 1 - starts, self.width)


class Documents(Split):
    """One document a row: x = terminator, c1 .. cn and y = c1 .. cn, terminator, both padded to `width`.

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

    def _find(self, numbers: Indices) -> tuple[Indices, Indices]:
        return self._starts[numbers], self._lengths[numbers]

    def _window(self, starts: Indices, lengths: Indices) -> Indices:
        window = super()._window(starts, lengths)
        window[:, 0] = window[np.arange(len(lengths)), lengths] = self._terminator  # the ends of a file may lack it
        return window


def chars_per_token(split: Split, tokenizer: Tokenizer) -> float:
    """Characters of text for each target of a split; nats per target / ln 2 / this = bits per character."""
    if not isinstance(tokenizer, ByteTokenizer):
        return 1.0
    characters = 0
    for begin in range(0, split.n_rows, 2**13):
        y = split.rows(np.arange(begin, min(begin + 2**13, split.n_rows))).y
        characters += int(np.count_nonzero((y & 0xC0 != 0x80) & (y != IGNORED)))  # 10xxxxxx continues a character
    return characters / split.n_tokens


def split_corpus(encoded: Encoded, config: DataConfig, block_size: int) -> tuple[Split, Split]:
    """The training and the validation part: the last `val_fraction` of the text, or of the shuffled documents.

    Windows are `block_size` wide; documents must fit.

    Raises:
        UserError: too little text for these settings.
    """
    if encoded.documents:
        return _split_documents(encoded, config, block_size)
    n = len(encoded.ids)
    n_train = _n_train(n, config.val_fraction)
    if n_train < block_size + 1:
        raise UserError(
            f"model.block_size={block_size}: longer than the training split, {n_train} tokens; "
            f"allowed: at most {max(n_train - 1, 0)}"
        )
    if n_train == n:
        raise UserError(
            f"data.val_fraction={config.val_fraction}: leaves none of the {n} tokens for validation; "
            f"allowed: at least {1 / n:.2g}"
        )
    return Windows(encoded.ids, 0, n_train, block_size), Windows(encoded.ids, n_train, n, block_size)


def _split_documents(encoded: Encoded, config: DataConfig, block_size: int) -> tuple[Split, Split]:
    terminator = int(encoded.tokenizer.encode("\n")[0])
    starts, lengths = _find_documents(encoded.ids.view(np.ndarray), terminator)
    n = len(starts)
    if n < 2:
        raise UserError(f"data.documents=true: the corpus has {n} lines that are not empty; allowed: at least 2")
    n_train = _n_train(n, config.val_fraction)
    if not 0 < n_train < n:
        raise UserError(
            f"data.val_fraction={config.val_fraction}: leaves {n_train} of the {n} documents for training and "
            f"{n - n_train} for validation; allowed: at least 1 each"
        )
    width = int(lengths.max()) + 1
    if width > block_size:
        raise UserError(
            f"model.block_size={block_size}: shorter than the longest document with its terminator, "
            f"{width} tokens; allowed: at least {width}"
        )
    order = np.argsort(_raw(config.split_seed, 0, n, SPLIT_STREAM), kind="stable")
    train, val = (
        Documents(encoded.ids, starts[part], lengths[part], width=width, terminator=terminator)
        for part in (order[:n_train], order[n_train:])
    )
    return train, val


def _n_train(n: int, val_fraction: float) -> int:
    """The rest of n, rounded down; n * (1 - 0.9) is a hair below what is meant, hence the inner rounding."""
    return int(round(n * (1 - val_fraction), 4))


def _find_documents(ids: NDArray[Any], terminator: int) -> tuple[Indices, Indices]:
    """Start and length of every line that is not empty, (documents,) each."""
    ends = [np.flatnonzero(ids[at : at + SCAN] == terminator) + at for at in range(0, len(ids), SCAN)]
    stops = np.concatenate([*ends, [len(ids)]]).astype(np.int64)
    starts = np.concatenate([[0], stops[:-1] + 1]).astype(np.int64)
    keep = stops > starts
    return starts[keep], (stops - starts)[keep]
