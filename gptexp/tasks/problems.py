"""Problems, each a prompt with its answer: the loss counts the answers alone."""

import json
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from gptexp.config.sections import DataConfig, Seed, TaskConfig
from gptexp.config.settings import settings
from gptexp.data.batches import IGNORED, SPLIT_STREAM, Batch, Indices, Split, draw, part_for_training, random_numbers
from gptexp.data.corpora import Corpus
from gptexp.data.encoding import Encoded
from gptexp.data.files import Part, json_lines
from gptexp.data.tokenizers import Ids, Tokenizer, learn_tokenizer
from gptexp.errors import UserError
from gptexp.registry import TASKS, TOKENIZERS

END = "\x03"  # ends an answer of a file, which may have several lines


class Problem(NamedTuple):
    """What is asked, and the text that answers it."""

    prompt: str
    answer: str


@dataclass(frozen=True, eq=False)
class EncodedProblems(Encoded):
    """The ids of all prompts and answers, and what they are."""

    problems: Sequence[Problem] = ()
    held_out: Set[str] = frozenset()  # the prompts of those that are for validation


class Problems(Split):
    """One problem per row: the prompt, the answer and the symbol that ends it, of which the last two are targets.

    Args:
        problems: prompts and answers, none of them empty.
        tokenizer: knows their symbols.
        end: the symbol that ends an answer.
        width: L; by default that of the longest problem.

    Attributes:
        problems: as given.
    """

    masked = True

    def __init__(
        self, problems: Sequence[Problem], tokenizer: Tokenizer, end: str = "\n", width: int | None = None
    ) -> None:
        texts = [text for prompt, answer in problems for text in (prompt, answer + end)]
        ids, lengths = _encoded(texts, tokenizer)
        self._prompts = lengths[::2]
        self._lengths = lengths[::2] + lengths[1::2] - 1  # of x, and of y
        self._starts = np.cumsum(self._lengths + 1) - self._lengths - 1
        super().__init__(ids, width or int(self._lengths.max()))
        self.problems, self.n_rows = problems, len(problems)
        self.n_tokens = int(lengths[1::2].sum())

    def train_batch(self, seed: int, step: int, batch_size: int, rows: slice = slice(None)) -> Batch:
        """Problems drawn at random, with repetition."""
        numbers = draw(seed, step, batch_size, self.n_rows)
        targets = (self._lengths - self._prompts + 1)[numbers].sum()
        return self.rows(numbers[rows])._replace(tokens=float(targets))

    def find(self, numbers: Indices) -> tuple[Indices, Indices]:
        """Where these rows begin, and how many positions each has."""
        return self._starts[numbers], self._lengths[numbers]

    def rows(self, indices: ArrayLike) -> Batch:
        """As its base; a prompt's own symbols are no targets."""
        batch = super().rows(indices)
        numbers = np.maximum(np.asarray(indices, np.int64), 0)
        batch.y[np.arange(self.width) < self._prompts[numbers, None] - 1] = IGNORED
        return batch._replace(tokens=float((batch.y != IGNORED).sum()))


class EndlessProblems(Problems):
    """Problems made at random for each batch; its numbered rows are some of them.

    Args:
        make: problems of (seed, step, number of problems), a pure function that never gives one that is held out.
        tokenizer: knows their symbols.
        width: L.
        n_rows: how many of them have numbers.
    """

    def __init__(
        self, make: Callable[[int, int, int], Sequence[Problem]], tokenizer: Tokenizer, width: int, n_rows: int
    ) -> None:
        super().__init__(make(0, 0, n_rows), tokenizer, width=width)
        self._make, self._tokenizer = make, tokenizer

    def train_batch(self, seed: int, step: int, batch_size: int, rows: slice = slice(None)) -> Batch:
        """New problems."""
        made = Problems(self._make(seed, step, batch_size), self._tokenizer, width=self.width)
        return made.rows(np.arange(batch_size)[rows])._replace(tokens=float(made.n_tokens))


def _encoded(texts: Sequence[str], tokenizer: Tokenizer) -> tuple[Ids, Indices]:
    """The ids of all texts, one after the other, and the length of each."""
    if tokenizer.one_per_character:  # all at once, which takes a fraction of the time
        return tokenizer.encode("".join(texts)), np.fromiter(map(len, texts), np.int64, len(texts))
    ids = [tokenizer.encode(text) for text in texts]
    return np.concatenate(ids), np.fromiter(map(len, ids), np.int64, len(ids))


def check_width(problems: Sequence[Problem], tokenizer: Tokenizer, end: str, block_size: int) -> int:
    """The positions of the longest row.

    Raises:
        UserError: when they are more than `block_size`.
    """
    longest = Problems(problems, tokenizer, end)
    if longest.width > block_size:
        raise UserError(f"model.block_size={block_size}: shorter than the longest prompt with its answer, "
                        f"{longest.width} tokens; allowed: at least {longest.width}")  # fmt: skip
    return longest.width


@settings
class ProblemsConfig(TaskConfig):
    """Base of the tasks of problems."""

    exact_match: ClassVar[bool] = True

    def document_start(self, data: DataConfig) -> None:
        """A prompt begins a row."""
        return

    def samples(self) -> int:
        """Ten problems, because they are short."""
        return 10


@TASKS.register("problems")
@settings
class ProblemFile(ProblemsConfig):
    """Answer the problems of a file of JSON lines, such as `{"prompt": "2+3=", "answer": "5"}`."""

    name: Literal["problems"] = "problems"
    prompt: str = "prompt"
    """The key of a line's prompt."""
    answer: str = "answer"
    """The key of a line's answer."""
    split_seed: Seed = 1337
    """The seed of the shuffle of the problems before the split."""

    def document_end(self, data: DataConfig) -> str:
        """A control character, so that answers may have several lines."""
        return END

    def problems(self, data: DataConfig) -> list[str]:
        """The file must be named."""
        return [] if data.name == "file" else [f"data.name={data.name}: task=problems needs data=file data.path=FILE"]

    def encode(self, corpus: Corpus, data: DataConfig) -> Encoded:
        """The problems, in their order.

        Raises:
            UserError: for the first line that holds none.
        """
        cut = len(corpus.parts) - corpus.val_files
        trained, held_out = ([self._problem(part, *line) for part in parts for line in json_lines(part)]
                             for parts in (corpus.parts[:cut], corpus.parts[cut:]))  # fmt: skip
        if both := {problem.prompt for problem in trained} & {problem.prompt for problem in held_out}:
            raise UserError(f"data.val_path={data.val_path}: {len(both)} of its prompts, such as {min(both)!r}, are in "
                            f"data.path={data.path}, too; allowed: problems that are not trained on")  # fmt: skip
        problems, chosen = [*trained, *held_out], {p.prompt for p in held_out} or self._chosen(trained, data)
        every = TOKENIZERS[data.tokenizer].made.one_per_character
        learned = [text for p in problems if every or p.prompt not in chosen for text in p]
        tokenizer = learn_tokenizer(data, lambda: iter((*learned, END)), None)
        digest = sha256(json.dumps([corpus.sha256, self.prompt, self.answer, tokenizer.to_dict()]).encode())
        ids, _ = _encoded([text for p in problems for text in p], tokenizer)
        return EncodedProblems(ids, tokenizer, digest.hexdigest(), problems=problems, held_out=chosen)

    def splits(self, encoded: Encoded, data: DataConfig, block_size: int) -> tuple[Split, Split]:
        """The last `val_fraction` of the shuffled prompts is for validation; each row must fit into `block_size`."""
        assert isinstance(encoded, EncodedProblems)
        width = check_width(encoded.problems, encoded.tokenizer, END, block_size)
        problems, held_out = encoded.problems, encoded.held_out
        train, val = (
            Problems([p for p in problems if (p.prompt in held_out) == held], encoded.tokenizer, END, width)
            for held in (False, True)
        )
        return train, val

    def _chosen(self, problems: Sequence[Problem], data: DataConfig) -> set[str]:
        """The prompts that are held out."""
        prompts = list(dict.fromkeys(problem.prompt for problem in problems))
        n, n_train = len(prompts), part_for_training(len(prompts), data.val_fraction)
        if not 0 < n_train < n:
            raise UserError(f"data.val_fraction={data.val_fraction}: leaves {n_train} of the {n} prompts for training "
                            f"and {n - n_train} for validation; allowed: at least 1 each")  # fmt: skip
        order = np.argsort(random_numbers(self.split_seed, 0, n, SPLIT_STREAM), kind="stable")
        return {prompts[i] for i in order[n_train:]}

    def _problem(self, part: Part, number: int, entry: Any) -> Problem:
        for key in (self.prompt, self.answer):
            where = f"data.path={part.path}: line {number}"
            if not isinstance(entry, dict) or not isinstance(entry.get(key), str) or not entry[key]:
                raise UserError(f'{where} has no text "{key}"; allowed: {{"{self.prompt}": TEXT, "{self.answer}": '
                                "TEXT}")  # fmt: skip
            if END in entry[key]:
                raise UserError(f'{where}: "{key}" has the character U+0003, which ends an answer')
        return Problem(entry[self.prompt], entry[self.answer])
