"""Sums, differences and products of whole numbers, made at random: no file is needed."""

import json
from collections.abc import Callable
from dataclasses import asdict, field, replace
from hashlib import sha256
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from annotated_types import Ge, Le, Len
from numpy.typing import NDArray

from gptexp.config.sections import DataConfig, Seed
from gptexp.config.settings import settings
from gptexp.data.batches import BATCH_STREAM, SPLIT_STREAM, Split, random_numbers
from gptexp.data.corpora import Corpus
from gptexp.data.encoding import Encoded
from gptexp.data.tokenizers import CharTokenizer
from gptexp.errors import UserError
from gptexp.registry import TASKS
from gptexp.tasks.problems import EndlessProblems, Problem, Problems, ProblemsConfig, check_width

MOST_DIGITS = 16  # of an operand: 64 random bits give each number equally often, to within a thousandth
TRIES = 200  # to find problems that are not known yet

Numbers = NDArray[np.int64]


class Operator(NamedTuple):
    """What is done with two numbers."""

    compute: Callable[[int, int], int]
    digits: Callable[[int], int]  # of the longest result, of operands with so many digits


OPERATORS = {
    "+": Operator(lambda a, b: a + b, lambda digits: digits + 1),
    "-": Operator(lambda a, b: a - b, lambda digits: digits),
    "*": Operator(lambda a, b: a * b, lambda digits: 2 * digits),
}


class Operation(NamedTuple):
    """Two numbers and what is done with them."""

    a: int
    operator: str
    b: int


@TASKS.register("arithmetic")
@settings
class Arithmetic(ProblemsConfig):
    """Add, subtract or multiply whole numbers, digit by digit: `128+367=` is followed by `495`."""

    corpus = False

    name: Literal["arithmetic"] = "arithmetic"
    operators: Annotated[list[Literal["+", "-", "*"]], Len(1)] = field(default_factory=lambda: ["+"])
    """What is done with two numbers; each is as frequent as the others."""
    digits: Annotated[int, Ge(1), Le(MOST_DIGITS)] = 3
    """The most digits of a number; all numbers are equally frequent."""
    reverse: bool = False
    """Write the answer from its last digit to its first, as one computes it."""
    zero_padding: bool = False
    """Write zeros before a number, so that all are of one length."""
    balance_digits: bool = False
    """Train on numbers of each length equally often; by themselves, nine of ten have `digits` digits."""
    balance_carries: bool = False
    """Train on sums with each number of carries equally often; by themselves, few or many are rare."""
    scratchpad: bool = False
    """Write every step of a sum before its answer (Lee et al. 2023, "Teaching Arithmetic to Small Transformers")."""
    train_examples: Annotated[int, Ge(1)] | None = None
    """Train on so many different problems; null makes new ones without end."""
    val_examples: Annotated[int, Ge(1)] = 1000
    """Problems held out for validation; none of them is trained on."""
    split_seed: Seed = 1337
    """Chooses the problems held out, and those to train on if they are limited."""

    def document_end(self, data: DataConfig) -> str:
        """The newline."""
        return "\n"

    def problems(self, data: DataConfig) -> list[str]:
        """Settings that have no effect together."""
        sums = self.operators == ["+"]
        rules = {
            f"task.operators={self.operators}: names an operator twice": len(set(self.operators)) < len(self.operators),
            "task.balance_carries=true: needs task.operators=['+']": self.balance_carries and not sums,
            "task.scratchpad=true: needs task.operators=['+']": self.scratchpad and not sums,
            f"data.tokenizer={data.tokenizer}: has no effect with task=arithmetic": data.tokenizer != "char",
            f"data.val_fraction={data.val_fraction}: has no effect with task=arithmetic; see task.val_examples":
                data.val_fraction != DataConfig.val_fraction,
        }  # fmt: skip
        return [*super().problems(data), *(line for line, applies in rules.items() if applies)]

    def questions(self) -> dict[str, Any]:
        """However they are written."""
        return {key: getattr(self, key) for key in ("name", "operators", "digits", "val_examples", "split_seed")}

    def encode(self, corpus: Corpus, data: DataConfig) -> Encoded:
        """No ids: a vocabulary alone."""
        longest = self.written(Operation(10**self.digits - 1, self.operators[0], 10**self.digits - 1))
        symbols = {*"0123456789=\n", *self.operators, *"".join(longest)}
        digest = sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return Encoded(np.empty(0, np.uint8), CharTokenizer("".join(sorted(symbols))), digest)

    def splits(self, encoded: Encoded, data: DataConfig, block_size: int) -> tuple[Split, Split]:
        """Problems to train on, and those held out.

        Raises:
            UserError: for more problems than there are, or a block that is shorter than the longest.
        """
        tokenizer, largest = encoded.tokenizer, 10**self.digits - 1
        longest = [self.written(Operation(a, sign, largest)) for sign in self.operators for a in (0, largest)]
        width = check_width(longest, tokenizer, "\n", block_size)
        # Of problems without end, at most half are held out, so that others are soon found.
        wanted = self.val_examples + (self.train_examples or self.val_examples)
        there = len(self.operators) * (largest + 1) ** 2
        if wanted > there:
            key = "val_examples" if self.train_examples is None else "train_examples"
            given = getattr(self, key)
            most = there // 2 if self.train_examples is None else max(0, there - self.val_examples)
            raise UserError(f"task.{key}={given}: there are {there:,} problems of task.digits={self.digits}, for "
                            f"training and validation; allowed: at most {most}")  # fmt: skip
        uniform = replace(self, balance_digits=False, balance_carries=False)
        held_out = uniform._different(self.val_examples, SPLIT_STREAM, set())
        val = Problems([self.written(o) for o in held_out], tokenizer, width=width)
        known = set(held_out)
        if self.train_examples is not None:
            chosen = self._different(self.train_examples, SPLIT_STREAM + 1, known)
            return Problems([self.written(o) for o in chosen], tokenizer, width=width), val

        def make(seed: int, step: int, count: int) -> list[Problem]:
            return [self.written(o) for o in self._drawn(seed, step, count, BATCH_STREAM, known)]

        return EndlessProblems(make, tokenizer, width, val.n_rows), val

    def written(self, operation: Operation) -> Problem:
        """The text of a problem and of its answer."""
        a, sign, b = operation
        result, places = OPERATORS[sign].compute(a, b), OPERATORS[sign].digits(self.digits)
        minus, size = ("-" if result < 0 else ""), str(abs(result))
        if self.zero_padding:
            size = size.zfill(places)
        answer = (minus + size)[::-1] if self.reverse else minus + size
        width = self.digits if self.zero_padding else 1
        steps = _scratchpad(a, b) if self.scratchpad else ""
        return Problem(f"{a:0{width}}{sign}{b:0{width}}=", steps + answer)

    def _different(self, count: int, stream: int, known: set[Operation]) -> list[Operation]:
        """So many different operations, none of them known."""
        found: dict[Operation, None] = {}
        for attempt in range(TRIES):
            drawn = self._operations(self.split_seed, attempt, max(count, 1000), stream)
            found |= dict.fromkeys(o for o in drawn if o not in known)
            if len(found) >= count:
                return list(found)[:count]
        raise UserError(f"task.train_examples={self.train_examples}, task.val_examples={self.val_examples}: nearly all "
                        "problems that there are; allowed: fewer")  # fmt: skip

    def _drawn(self, seed: int, step: int, count: int, stream: int, known: set[Operation]) -> list[Operation]:
        """Operations at random, with repetition, none of them known."""
        drawn = self._operations(seed, step, count, stream)
        for attempt in range(1, TRIES):
            again = [i for i, operation in enumerate(drawn) if operation in known]
            if not again:
                return drawn
            others = self._operations(seed, step, count, stream + (attempt << 8))
            for i in again:
                drawn[i] = others[i]
        rest = [operation for operation in drawn if operation not in known]  # where a balance asks for what is held out
        if not rest:
            raise UserError(f"task.val_examples={self.val_examples}: leaves nothing to train on; allowed: fewer")
        return [operation if operation not in known else rest[i % len(rest)] for i, operation in enumerate(drawn)]

    def _operations(self, seed: int, step: int, count: int, stream: int) -> list[Operation]:
        """Operations at random: a pure function."""
        columns = 5 + 2 * self.digits
        numbers = random_numbers(seed, step, count * columns, stream).reshape(count, columns)
        digits = np.full(count, self.digits)
        if self.balance_digits:
            digits = 1 + _below(numbers[:, 1], self.digits)
        if self.balance_carries:
            a, b = _with_carries(numbers[:, 4:], digits)
        else:
            a, b = (_below(numbers[:, i], 10**digits) for i in (2, 3))
        signs = _below(numbers[:, 0], len(self.operators)).tolist()
        return [Operation(*o) for o in zip(a.tolist(), (self.operators[i] for i in signs), b.tolist(), strict=True)]


def _below(numbers: NDArray[np.uint64], n: int | Numbers) -> Numbers:
    """Random bits as numbers in 0 .. n - 1."""
    return (numbers % np.asarray(n).astype(np.uint64)).astype(np.int64)


def _pairs(carry_in: int, carry_out: int) -> Numbers:
    """The pairs of digits that turn a carry into a carry, (pairs, 2)."""
    return np.array([(x, y) for x in range(10) for y in range(10) if (x + y + carry_in >= 10) == carry_out])


_PAIRS = {(i, o): _pairs(i, o) for i in (0, 1) for o in (0, 1)}


def _with_carries(numbers: NDArray[np.uint64], digits: Numbers) -> tuple[Numbers, Numbers]:
    """Pairs of numbers whose sums have 0 .. `digits` carries, each equally often, at any places.

    Args:
        numbers: (pairs, 1 + 2 places), 64 random bits each.
        digits: (pairs,) of the numbers, at most so many places.
    """
    places = numbers.shape[1] // 2
    inside = np.arange(places) < digits[:, None]  # the last digit first
    order = np.argsort(np.argsort(np.where(inside, numbers[:, 1 : 1 + places] >> np.uint64(1), 2**63), axis=1), axis=1)
    carry_out = (order < _below(numbers[:, 0], digits + 1)[:, None]).astype(np.int64)
    carry_in = np.pad(carry_out, ((0, 0), (1, 0)))[:, :places]
    chosen = np.zeros((*carry_out.shape, 2), np.int64)
    for (carried, carry), pairs in _PAIRS.items():
        here = (carry_in == carried) & (carry_out == carry) & inside
        chosen[here] = pairs[_below(numbers[:, 1 + places :][here], len(pairs))]
    values = (chosen * 10 ** np.arange(places)[:, None]).sum(1)
    return values[:, 0], values[:, 1]


def _scratchpad(a: int, b: int) -> str:
    """The steps of a sum, from the last digits on: the digits, the sum, what is written and what is carried."""
    steps, written, carry = [], "", 0
    for x, y in zip(*(reversed(str(n).zfill(len(str(max(a, b))))) for n in (a, b)), strict=True):
        total = int(x) + int(y) + carry
        written, before, carry = f"{total % 10}{written}", carry, total // 10
        steps.append(f"{x}+{y}+{before}={total},A->{written},C->{carry}")
    return f"<{';'.join(steps)}>"
