"""Tasks on plain text: running text, and documents of one line each."""

from collections.abc import Callable, Iterator
from itertools import count
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge
from numpy.typing import NDArray

from gptexp.config.sections import DataConfig, Seed, TaskConfig
from gptexp.config.settings import settings
from gptexp.data.batches import (
    SPLIT_STREAM,
    Contexts,
    Documents,
    Indices,
    Split,
    Windows,
    part_for_training,
    random_numbers,
)
from gptexp.data.encoding import Encoded
from gptexp.data.files import lines
from gptexp.errors import UserError
from gptexp.registry import CORPORA, TASKS, TOKENIZERS

SCAN = 2**24  # ids searched at a time, so that a large corpus takes little memory


@TASKS.register("text")
@settings
class Text(TaskConfig):
    """Predict every next token of running text, in windows that may begin anywhere."""

    name: Literal["text"] = "text"

    def held_out(self, texts: Callable[[], Iterator[str]], data: DataConfig) -> Iterator[tuple[str, bool]]:
        """The last `val_fraction` of the characters."""
        left = part_for_training(sum(map(len, texts())), data.val_fraction)
        for text in texts():
            yield from ((part, held) for part, held in ((text[:left], False), (text[left:], True)) if part)
            left = max(0, left - len(text))

    def splits(self, encoded: Encoded, data: DataConfig, block_size: int) -> tuple[Split, Split]:
        """The last `val_fraction` of the text is for validation; windows are `block_size` wide."""
        n = len(encoded.ids)
        n_train = part_for_training(n, data.val_fraction) if encoded.val_start is None else encoded.val_start
        if n_train < block_size + 1:
            raise UserError(f"model.block_size={block_size}: longer than the training split, {n_train} tokens; "
                            f"allowed: at most {max(n_train - 1, 0)}")  # fmt: skip
        if n_train == n:
            raise UserError(f"data.val_fraction={data.val_fraction}: leaves none of the {n} tokens for validation; "
                            f"allowed: at least {1 / n:.2g}")  # fmt: skip
        return Windows(encoded.ids, 0, n_train, block_size), Windows(encoded.ids, n_train, n, block_size)


@TASKS.register("documents")
@settings
class Lines(TaskConfig):
    """Predict documents, one per line, from their first symbol to their end; a row of a batch holds one document."""

    name: Literal["documents"] = "documents"
    terminator: str | None = None
    """The symbol that opens and closes a document, in place of the newline; null takes the corpus's own."""
    split_seed: Seed = 1337
    """The seed of the shuffle of the documents before the split."""
    context: Annotated[int, Ge(1)] | None = None
    """Rows of one prediction each, from so many symbols before it, instead of whole documents."""

    def document_end(self, data: DataConfig) -> str:
        """The setting, or the corpus's own; the newline for tokenizers whose symbols are not characters."""
        if self.terminator is None and TOKENIZERS[data.tokenizer].made.one_per_character:
            return str(CORPORA[data.name].made.terminator)
        return self.terminator or "\n"

    def document_start(self, data: DataConfig) -> str:
        """The same symbol."""
        return self.document_end(data)

    def problems(self, data: DataConfig) -> list[str]:
        """The terminator must be a symbol of the tokenizer."""
        text, symbol = f"task.terminator={self.terminator!r}:", self.terminator
        if symbol is not None and (len(symbol) != 1 or "\ud800" <= symbol <= "\udfff"):
            return [f"{text} allowed: exactly one character"]
        if symbol not in (None, "\n") and not TOKENIZERS[data.tokenizer].made.one_per_character:
            return [f"{text} has no effect with data.tokenizer={data.tokenizer}, whose documents end with the newline"]
        return super().problems(data)

    def held_out(self, texts: Callable[[], Iterator[str]], data: DataConfig) -> Iterator[tuple[str, bool]]:
        """The documents that `splits` chooses."""
        n = sum(line != "\n" for line in lines(texts()))
        held = np.zeros(n, bool)
        held[self._order(n)[part_for_training(n, data.val_fraction) :]] = True
        numbers = count()
        return ((line, line != "\n" and bool(held[next(numbers)])) for line in lines(texts()))

    def splits(self, encoded: Encoded, data: DataConfig, block_size: int) -> tuple[Split, Split]:
        """The last `val_fraction` of the shuffled documents is for validation; each must fit into `block_size`."""
        terminator = int(encoded.tokenizer.encode("\n")[0])
        starts, lengths = find_documents(encoded.ids.view(np.ndarray), terminator)
        n = len(starts)
        if n < 2:
            raise UserError(f"task=documents: the corpus has {n} lines that are not empty; allowed: at least 2")
        own = encoded.val_start if data.val_path is not None else None
        n_train = part_for_training(n, data.val_fraction) if own is None else int(np.searchsorted(starts, own))
        if not 0 < n_train < n:
            key = f"data.val_fraction={data.val_fraction}" if own is None else f"data.val_path={data.val_path}"
            raise UserError(f"{key}: leaves {n_train} of the {n} documents for "
                            f"training and {n - n_train} for validation; allowed: at least 1 each")  # fmt: skip
        width = self.context or int(lengths.max()) + 1
        if self.context and width > block_size:
            raise UserError(f"task.context={width}: longer than model.block_size={block_size}; allowed: at most that")
        if width > block_size:
            raise UserError(f"model.block_size={block_size}: shorter than the longest document with its terminator, "
                            f"{width} tokens; allowed: at least {width}")  # fmt: skip
        order = self._order(n) if own is None else np.arange(n)
        split = Contexts if self.context else Documents
        train, val = (
            split(encoded.ids, starts[part], lengths[part], width=width, terminator=terminator)
            for part in (order[:n_train], order[n_train:])
        )
        return train, val

    def _order(self, n: int) -> Indices:
        """The documents, shuffled."""
        return np.argsort(random_numbers(self.split_seed, 0, n, SPLIT_STREAM), kind="stable")

    def samples(self) -> int:
        """Ten, because documents are short."""
        return 10


def find_documents(ids: NDArray[np.generic], terminator: int) -> tuple[Indices, Indices]:
    """Start and length of every line that is not empty, (documents,) each."""
    ends = [np.flatnonzero(ids[at : at + SCAN] == terminator) + at for at in range(0, len(ids), SCAN)]
    stops = np.concatenate([*ends, [len(ids)]]).astype(np.int64)
    starts = np.concatenate([[0], stops[:-1] + 1]).astype(np.int64)
    keep = stops > starts
    return starts[keep], (stops - starts)[keep]
