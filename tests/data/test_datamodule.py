from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from gptexp.data.batches import Batch, Windows
from gptexp.data.datamodule import CharDataModule
from gptexp.data.encoding import Encoded
from gptexp.data.tokenizers import CharTokenizer
from gptexp.errors import UserError
from tests.data.conftest import cut

TRAIN, VAL = Windows(np.arange(500), 0, 300, 4), Windows(np.arange(500), 300, 500, 4)
LINES = ["a" * n for n in range(1, 21)]


def of_splits(train=TRAIN, val=VAL, **settings) -> CharDataModule:
    """A data module of splits that were made by hand."""
    data = CharDataModule(**{"seed": 3, "batch_size": 12, "eval_batch_size": 5, **settings})
    data.train, data.val = train, val
    return data


def module(train=TRAIN, val=VAL, *, rank=0, world=1, step=0, fn=TrainerFn.FITTING, **settings) -> CharDataModule:
    data = of_splits(train, val, **settings)
    data.trainer = SimpleNamespace(
        global_rank=rank, world_size=world, global_step=step, state=SimpleNamespace(fn=fn), overfit_batches=0,
        strategy=SimpleNamespace(root_device=torch.device("cpu")), accumulate_grad_batches=data.accumulate,
    )  # fmt: skip
    return data


def documents():
    tokenizer = CharTokenizer(".a", ".")
    ids = tokenizer.encode("\n".join(LINES)).astype(np.uint8)
    return cut(Encoded(ids, tokenizer, ""), 32, documents=True, val_fraction=0.4)


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (1, 3), (2, 1), (2, 3), (4, 3)])
@pytest.mark.parametrize("splits", [(TRAIN, VAL), documents()], ids=["windows", "documents"])
def test_shares_make_up_the_batch_of_one_process(world, accumulate, splits):
    whole = list(islice(of_splits(*splits).train_dataloader(), 3))
    shares = [
        list(islice(module(*splits, rank=rank, world=world, accumulate=accumulate).train_dataloader(), 3 * accumulate))
        for rank in range(world)
    ]
    for step, batch in enumerate(whole):
        assert batch.x.dtype == batch.y.dtype == torch.int64
        assert batch.x.is_contiguous()
        parts = [shares[r][step * accumulate + m] for m in range(accumulate) for r in range(world)]
        assert torch.equal(torch.cat([part.x for part in parts]), batch.x)
        assert torch.equal(torch.cat([part.y for part in parts]), batch.y)
        assert all((part.mask is None) == (batch.mask is None) for part in parts)
        # Summed losses / tokens, averaged over processes and micro-batches, is the mean over all targets.
        losses = [part.y.clamp(min=0).sum().item() / part.tokens for part in parts]
        assert np.mean(losses) == pytest.approx(batch.y.clamp(min=0).sum().item() / (batch.y >= 0).sum().item())


def test_iteration_begins_at_the_step_of_the_trainer_and_can_be_repeated():
    loader = module(accumulate=2).train_dataloader()
    first = list(islice(loader, 10))
    assert all(torch.equal(a.x, b.x) for a, b in zip(first, islice(loader, 10), strict=True))
    resumed = list(islice(module(accumulate=2, step=3).train_dataloader(), 4))
    assert all(torch.equal(a.x, b.x) for a, b in zip(first[6:], resumed, strict=True))


@pytest.mark.parametrize(("world", "accumulate", "least", "sizes"), [
    (1, 1, 1, [3, 6, 9, 12, 12]), (2, 1, 1, [2, 6, 8, 12, 12]), (2, 2, 1, [4, 4, 8, 12, 12]),
    (1, 1, 5, [5, 6, 9, 12, 12]),
])  # fmt: skip
def test_a_batch_that_grows(world, accumulate, least, sizes):
    """To 12 rows in three steps; its rows are the first ones of the whole batch, and its losses still a mean."""
    whole = list(islice(of_splits(*documents()).train_dataloader(), 5))
    growing = {"batch_warmup_steps": 3, "min_sequences": least, "accumulate": accumulate}
    shares = [list(islice(module(*documents(), rank=rank, world=world, **growing).train_dataloader(), 5 * accumulate))
              for rank in range(world)]  # fmt: skip
    for step, size in enumerate(sizes):
        parts = [shares[r][step * accumulate + m] for m in range(accumulate) for r in range(world)]
        assert torch.equal(torch.cat([part.y for part in parts]), whole[step].y[:size])
        losses = [part.y.clamp(min=0).sum().item() / part.tokens for part in parts]
        y = whole[step].y[:size]
        assert np.mean(losses) == pytest.approx(y.clamp(min=0).sum().item() / (y >= 0).sum().item())
    later = next(iter(module(*documents(), step=2, batch_warmup_steps=3).train_dataloader()))
    assert torch.equal(later.y, whole[2].y[:9])


def test_batch_that_cannot_be_shared():
    with pytest.raises(UserError, match=r"^batch_size=12: .*2 processes with 4 .*a multiple of 8$"):
        module(world=2, accumulate=4).train_dataloader()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 5), st.booleans())
def test_every_row_is_on_one_process_and_all_have_as_many_batches(n_tokens, size, world, of_documents):
    val = documents()[1] if of_documents else Windows(np.arange(100), 50, 50 + n_tokens, 3)
    loaders = [module(val=val, rank=r, world=world, eval_batch_size=size).val_dataloader(True) for r in range(world)]
    batches = [list(loader) for loader in loaders]
    shapes = [[tuple(batch.x.shape) for batch in each] for each in batches]
    assert all(each == shapes[0] for each in shapes)
    assert {len(loader) for loader in loaders} == {len(shapes[0])}
    assert max(rows for rows, _ in shapes[0]) <= size
    rows = [
        (x, y) for each in batches for batch in each for x, y in zip(batch.x.tolist(), batch.y.tolist(), strict=True)
    ]
    real = [row for row in rows if max(row[1]) >= 0]
    expected = val.rows(np.arange(val.n_rows))
    assert sorted(real) == sorted(zip(expected.x.tolist(), expected.y.tolist(), strict=True))
    assert len(rows) - len(real) < world
    for batch in (batch for each in batches for batch in each):
        assert batch.tokens == (batch.y >= 0).sum()
        assert bool((batch.y >= 0).all()) if batch.mask is None else torch.equal(batch.mask, batch.y >= 0)


@pytest.mark.parametrize(
    ("fn", "whole", "n_rows"),
    [(TrainerFn.FITTING, None, 6), (TrainerFn.FITTING, True, 50), (TrainerFn.VALIDATING, None, 50),
     (TrainerFn.VALIDATING, False, 6)],
)  # fmt: skip
def test_some_windows_are_enough_during_training(fn, whole, n_rows):
    batches = list(module(fn=fn, eval_windows=6).val_dataloader(whole))
    starts = torch.cat([batch.x[:, 0] for batch in batches])
    assert len(starts) == n_rows
    if n_rows == 6:
        assert (starts - 299).tolist() == [0, 4 * 8, 4 * 16, 4 * 25, 4 * 33, 4 * 41]


def test_more_windows_than_there_are_and_no_trainer():
    assert sum(len(batch.x) for batch in module(eval_windows=51).val_dataloader()) == 50
    data = of_splits(eval_batch_size=64, eval_windows=6)
    [batch] = data.val_dataloader()
    assert batch.x.shape == (50, 4)
    assert next(iter(data.train_dataloader())).tokens == 48


class Recorder(LightningModule):
    """Learns nothing and remembers which windows it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []
        self.validated = 0

    def training_step(self, batch: Batch, _: int) -> torch.Tensor:
        assert isinstance(batch, Batch)
        self.seen.append(batch.x[:, 0].tolist())
        return self.weight * batch.tokens

    def validation_step(self, batch: Batch, _: int) -> None:
        self.validated += len(batch.x)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(tmp_path, max_steps: int, checkpoint: str | None = None) -> Recorder:
    trainer = Trainer(
        default_root_dir=tmp_path, accelerator="cpu", max_steps=max_steps, accumulate_grad_batches=2,
        val_check_interval=4, check_val_every_n_epoch=None, num_sanity_val_steps=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    data = of_splits(batch_size=4, accumulate=2, eval_windows=6)
    recorder = Recorder()
    trainer.fit(recorder, datamodule=data, ckpt_path=checkpoint)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    return recorder


@pytest.mark.filterwarnings("ignore")
def test_lightning_trains_and_resumes_on_the_same_batches(tmp_path):
    whole = fit(tmp_path / "whole", 6)
    assert len(whole.seen) == 12
    assert len({tuple(rows) for rows in whole.seen}) == 12
    assert whole.validated == 3 * 6
    first = fit(tmp_path / "parts", 3)
    second = fit(tmp_path / "parts", 6, str(tmp_path / "parts" / "last.ckpt"))
    assert first.seen + second.seen == whole.seen
