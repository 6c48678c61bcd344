"""The splits as Lightning takes them: tensors, each process its share of every batch."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn

from gptexp.config import read_section
from gptexp.data.batches import Batch, Indices, Split, chars_per_token, split_corpus
from gptexp.data.corpora import find_corpus
from gptexp.data.encoded import Encoded, encode_corpus
from gptexp.data.settings import DataConfig
from gptexp.errors import UserError


class CharDataModule(LightningDataModule):
    """A corpus as batches: training batches without end, and each target of the validation split once.

    Args:
        data: which corpus, how it is cut into symbols and splits: a `DataConfig` or a mapping of its fields.
        block_size: the most positions of a row.
        batch_size: rows of one optimizer step, over all processes and micro-batches. The rows of micro-batch m
            of process r are the (m * processes + r)-th equal share of them.
        accumulate: micro-batches that `batch_size` is cut into; as many as the trainer's `accumulate_grad_batches`
            make one optimizer step.
        eval_batch_size: rows of one evaluation batch on one process.
        eval_windows: rows of the validation split that are enough during training, evenly spaced and always
            the same ones; None for all of them.
        seed: of the training batches.

    Attributes:
        encoded: the corpus as ids, with its tokenizer; known after `setup`.
        train: the part of the corpus to learn from.
        val: the part of the corpus to measure on.

    Raises:
        UserError: for a mistake in `data`.
    """

    encoded: Encoded
    train: Split
    val: Split

    def __init__(
        self, data: DataConfig | Mapping[str, Any] | None = None, *, block_size: int = 64, batch_size: int = 12,
        accumulate: int = 1, eval_batch_size: int = 64, eval_windows: int | None = None, seed: int = 1337,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config: DataConfig = read_section("data", data)
        self.block_size, self.seed = block_size, seed
        self.batch_size, self.accumulate = batch_size, accumulate
        self.eval_batch_size, self.eval_windows = eval_batch_size, eval_windows

    def prepare_data(self) -> None:
        """Download and encode the corpus into the cache folder, once per machine.

        Raises:
            UserError: when the corpus is out of reach.
        """
        encode_corpus(find_corpus(self.config), self.config)

    def setup(self, stage: str | None = None) -> None:
        """Open the encoded corpus and split it; every process calls this, and may do so again at no cost.

        Raises:
            UserError: too little text for these settings.
        """
        if not hasattr(self, "train"):
            self.encoded = encode_corpus(find_corpus(self.config), self.config)
            self.train, self.val = split_corpus(self.encoded, self.config, self.block_size)

    @property
    def vocab_size(self) -> int:
        """Number of symbols; reads the corpus if need be."""
        self.setup()
        return self.encoded.tokenizer.vocab_size

    @property
    def chars_per_token(self) -> float:
        """Mean number of characters that a token of the validation split stands for; reads the corpus if need be."""
        self.setup()
        return chars_per_token(self.val, self.encoded.tokenizer)

    def train_dataloader(self) -> "TrainBatches":
        """The micro-batches of this process from the trainer's current step on, without end.

        Raises:
            UserError: a batch_size that the processes and micro-batches cannot share equally.
        """
        shares = self.place[1] * self.accumulate
        if self.batch_size % shares:
            raise UserError(
                f"batch_size={self.batch_size}: cannot be shared equally by {self.place[1]} processes with "
                f"{self.accumulate} micro-batches each; allowed: a multiple of {shares}"
            )
        return TrainBatches(self)

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
    def place(self) -> tuple[int, int]:
        """This process's rank and the number of processes."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def tensors(self, batch: Batch) -> Batch:
        """The batch as tensors, in memory from which a GPU can copy on its own if there is one."""
        x, y, mask = (None if part is None else torch.from_numpy(part) for part in batch[:3])
        if self.trainer is not None and self.trainer.strategy.root_device.type == "cuda":
            x, y, mask = (None if part is None else part.pin_memory() for part in (x, y, mask))
        return batch._replace(x=x, y=y, mask=mask)


class TrainBatches:
    """The training batches of one process. Each iteration begins at the step the trainer is at."""

    def __init__(self, data: CharDataModule) -> None:
        self._data = data

    def __iter__(self) -> Iterator[Batch]:
        """Micro-batches without end, `accumulate_grad_batches` of the trainer for each step."""
        data, trainer = self._data, self._data.trainer
        rank, world = data.place
        size = data.batch_size // (world * data.accumulate)
        # A trainer that is to overfit some batches wants these again in each epoch.
        step = 0 if trainer is None or trainer.overfit_batches else trainer.global_step
        while True:
            micro_batches = data.accumulate if trainer is None else trainer.accumulate_grad_batches
            shares = world * micro_batches
            for micro in range(micro_batches):
                begin = (micro * world + rank) * size
                batch = data.train.train_batch(data.seed, step, size * shares, slice(begin, begin + size))
                yield data.tensors(batch._replace(tokens=batch.tokens / shares))
            step += 1


class EvalBatches:
    """Some rows of the validation split, each on exactly one process.

    Processes that would otherwise have fewer rows than others get rows of nothing but padding, since they
    wait for each other at every batch. There are fewer of those than processes.
    """

    def __init__(self, data: CharDataModule, indices: Indices, whole: bool) -> None:
        self._data, self._indices, self._whole = data, indices, whole

    def __len__(self) -> int:
        return math.ceil(len(self._indices) / (self._data.eval_batch_size * self._data.place[1]))

    def __iter__(self) -> Iterator[Batch]:
        """Batches of `eval_batch_size` rows; the last one may have fewer."""
        data = self._data
        rank, world = data.place
        together = data.eval_batch_size * world
        for begin in range(0, len(self._indices), together):
            indices = self._indices[begin : begin + together]
            padded = np.pad(indices, (0, -len(indices) % world), constant_values=-1)
            batch = data.val.rows(padded.reshape(world, -1)[rank])
            yield data.tensors(batch._replace(whole=self._whole))
