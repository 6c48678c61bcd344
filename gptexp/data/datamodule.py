"""The splits for Lightning: batches of tensors, of which each process gets its share."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn

from gptexp.config.schema import read_section
from gptexp.config.sections import DataConfig, TaskConfig
from gptexp.data.batches import Batch, Indices, Split, chars_per_token
from gptexp.data.encoding import Encoded, read_corpus
from gptexp.errors import UserError
from gptexp.registry import CORPORA

COUNTED, COUNTED_AT_ONCE = 2**22, 2**20  # of a large corpus, so many tokens tell which are rare


class CharDataModule(LightningDataModule):
    """A corpus as batches: endless training batches, and each target of the validation split once.

    Args:
        data: the corpus, and how it is cut into symbols and splits: a `DataConfig` or a mapping of its fields.
        task: what to predict: settings such as `{"name": "documents"}`, or a `TaskConfig`. None is the default task of
            the corpus.
        block_size: the most positions in a row.
        batch_size: rows of one optimizer step, over all processes and micro-batches. The rows of micro-batch m
            of process r are the (m * processes + r)-th equal share of them.
        accumulate: micro-batches that `batch_size` is cut into; as many as the trainer's `accumulate_grad_batches`
            make one optimizer step.
        batch_warmup_steps: steps in which the rows of a step grow in a straight line to `batch_size`, as far as the
            processes and micro-batches can share them equally, from `min_sequences` for each of these on.
        min_sequences: the fewest rows of a micro-batch.
        eval_batch_size: rows of one evaluation batch on one process.
        eval_windows: rows of the validation split to use during training, evenly spaced and always the same ones; None
            for all of them.
        seed: of the training batches.

    Attributes:
        config: settings of the data; after `setup`, those of the fallback if that was read.
        task: what to predict, likewise.
        encoded: the corpus as ids, with its tokenizer; known after `setup`.
        train: the training split.
        val: the validation split.

    Raises:
        UserError: for a mistake in `data` or `task`.
    """

    encoded: Encoded
    train: Split
    val: Split

    def __init__(
        self, data: DataConfig | Mapping[str, Any] | None = None, task: TaskConfig | Mapping[str, Any] | None = None,
        *, block_size: int = 64, batch_size: int = 12, accumulate: int = 1, batch_warmup_steps: int = 0,
        min_sequences: int = 1, eval_batch_size: int = 64, eval_windows: int | None = None, seed: int = 1337,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config: DataConfig = read_section("data", data)
        own = {"name": CORPORA[self.config.name].made.task}
        self.task: TaskConfig = read_section("task", own if task is None else task)
        if problems := self.task.problems(self.config):
            raise UserError(problems)
        self.block_size, self.seed = block_size, seed
        self.batch_size, self.accumulate = batch_size, accumulate
        self.batch_warmup_steps, self.min_sequences = batch_warmup_steps, min_sequences
        self.eval_batch_size, self.eval_windows = eval_batch_size, eval_windows

    def prepare_data(self) -> None:
        """Download and encode the corpus into the cache folder, once per machine.

        Raises:
            UserError: when the corpus cannot be had.
        """
        read_corpus(self.config, self.task)

    def setup(self, stage: str | None = None) -> None:
        """Open the encoded corpus and split it; every process calls this, and calling it again costs nothing.

        Raises:
            UserError: too little text for these settings.
        """
        if not hasattr(self, "train"):
            reading = read_corpus(self.config, self.task)
            self.config, self.task, self.encoded = reading.data, reading.task, reading.encoded
            self.train, self.val = self.task.splits(self.encoded, self.config, self.block_size)

    @property
    def vocab_size(self) -> int:
        """Number of symbols; reads the corpus if necessary."""
        self.setup()
        return self.encoded.tokenizer.vocab_size

    @property
    def chars_per_token(self) -> float:
        """Mean number of characters per token of the validation split; reads the corpus if necessary."""
        self.setup()
        return chars_per_token(self.val, self.encoded.tokenizer)

    def summary(self) -> str:
        """The symbols, the rarest of them, and the sizes of the splits; reads the corpus if necessary."""
        self.setup()
        tokenizer, counts = self.encoded.tokenizer, np.zeros(self.vocab_size, np.int64)
        for begin in range(0, min(len(self.encoded.ids), COUNTED), COUNTED_AT_ONCE):
            counts += np.bincount(self.encoded.ids[begin : begin + COUNTED_AT_ONCE], minlength=self.vocab_size)
        rarest = ", ".join(f"{tokenizer.decode([i])!r} ({counts[i]:,})" for i in np.argsort(counts, kind="stable")[:3])
        return (f"{tokenizer.vocab_size:,} symbols, the rarest {rarest}; {self.train.n_tokens:,} tokens to train on, "
                f"{self.val.n_tokens:,} for validation")  # fmt: skip

    def train_dataloader(self) -> "TrainBatches":
        """The micro-batches of this process, from the trainer's current step on, without end.

        Raises:
            UserError: a batch_size that the processes and micro-batches cannot share equally.
        """
        shares = self.rank_and_world[1] * self.accumulate
        if self.batch_size % shares:
            raise UserError(
                f"batch_size={self.batch_size}: cannot be shared equally by {self.rank_and_world[1]} processes with "
                f"{self.accumulate} micro-batches each; allowed: a multiple of {shares}"
            )
        return TrainBatches(self)

    def share(self, step: int, shares: int) -> int:
        """The rows of each of so many equal shares of a step's batch, for steps from 0 on."""
        grown = min(1.0, (step + 1) / (self.batch_warmup_steps + 1))
        return max(self.min_sequences, int(round(self.batch_size * grown, 4)) // shares)

    def all_training_rows(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """x and y of all rows of the training split, each target once."""
        for begin in range(0, self.train.n_rows, self.eval_batch_size):
            numbers = np.arange(begin, min(begin + self.eval_batch_size, self.train.n_rows))
            batch = self.tensors(self.train.rows(numbers))
            yield batch.x, batch.y

    def val_dataloader(self, whole: bool | None = None) -> "EvalBatches":
        """The batches of this process, the same number on every process.

        Args:
            whole: True for the whole validation split, False for `eval_windows` rows of it. None, which is how the
                trainer calls, is False while fitting and True otherwise.
        """
        if whole is None:
            whole = self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING
        whole = whole or self.eval_windows is None
        n_rows = self.val.n_rows
        n_wanted = n_rows if whole else min(self.eval_windows or n_rows, n_rows)
        return EvalBatches(self, np.arange(n_wanted) * n_rows // n_wanted, whole)

    @property
    def rank_and_world(self) -> tuple[int, int]:
        """This process's rank and the number of processes."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def tensors(self, batch: Batch) -> Batch:
        """The batch as tensors, in pinned memory if there is a GPU."""
        x, y, mask = (None if part is None else torch.from_numpy(part) for part in batch[:3])
        if self.trainer is not None and self.trainer.strategy.root_device.type == "cuda":
            x, y, mask = (None if part is None else part.pin_memory() for part in (x, y, mask))
        return batch._replace(x=x, y=y, mask=mask)


@dataclass(frozen=True, eq=False)
class TrainBatches:
    """The training batches of one process. Each iteration begins at the trainer's current step."""

    data: CharDataModule

    def __iter__(self) -> Iterator[Batch]:
        """Micro-batches without end, `accumulate_grad_batches` of the trainer for each step."""
        data, trainer = self.data, self.data.trainer
        rank, world = data.rank_and_world
        # To overfit some batches, a trainer needs the same ones in each epoch.
        step = 0 if trainer is None or trainer.overfit_batches else trainer.global_step
        while True:
            micro_batches = data.accumulate if trainer is None else trainer.accumulate_grad_batches
            shares = world * micro_batches
            size = data.share(step, world * data.accumulate)
            for micro in range(micro_batches):
                begin = (micro * world + rank) * size
                batch = data.train.train_batch(data.seed, step, size * shares, slice(begin, begin + size))
                yield data.tensors(batch._replace(tokens=batch.tokens / shares))
            step += 1


@dataclass(frozen=True, eq=False)
class EvalBatches:
    """Some rows of the validation split, each on exactly one process.

    Processes wait for each other at every batch, so those with fewer rows than others get rows of padding. There are
    fewer of these rows than processes.
    """

    data: CharDataModule
    indices: Indices
    whole: bool

    def __len__(self) -> int:
        return math.ceil(len(self.indices) / (self.data.eval_batch_size * self.data.rank_and_world[1]))

    def __iter__(self) -> Iterator[Batch]:
        """Batches of `eval_batch_size` rows; the last one may have fewer."""
        rank, world = self.data.rank_and_world
        together = self.data.eval_batch_size * world
        for begin in range(0, len(self.indices), together):
            indices = self.indices[begin : begin + together]
            padded = np.pad(indices, (0, -len(indices) % world), constant_values=-1)
            batch = self.data.val.rows(padded.reshape(world, -1)[rank])
            yield self.data.tensors(batch._replace(whole=self.whole))
