"""A whole run with symbols of several characters: what it measures, keeps and writes."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as LibraryTokenizer
from torch.nn import functional as F

from gptexp import sample
from gptexp.data.tokenizers import tokenizer_from_dict
from gptexp.runs.files import read_metrics
from gptexp.runs.run import Run
from gptexp.training.load import load_data, load_model
from tests.conftest import TINY


@pytest.fixture
def run(command: Callable[..., int], corpus: Path, tmp_path: Path) -> Run:
    bpe = ["tokenizer=bpe", "data.vocab_size=300"]
    assert command(*TINY, *bpe, f"data.path={corpus}", f"hydra.run.dir={tmp_path / 'run'}") == 0
    return Run.open(tmp_path / "run")


def test_bits_per_character(run: Run) -> None:
    """The losses of all targets, over the characters of the held-out text."""
    tokenizer, data = tokenizer_from_dict(run.info["tokenizer"]), load_data(run, run.config)
    assert tokenizer.vocab_size == 300
    model, nats, text = load_model(run, "last", 300), 0.0, []
    for batch in data.val_dataloader():
        with torch.no_grad():
            logits = model(batch.x)
        nats += float(F.cross_entropy(logits.flatten(0, 1), batch.y.flatten(), ignore_index=-1, reduction="sum"))
        text.append(tokenizer.decode(batch.y[batch.y >= 0].numpy()))
    last = read_metrics(run.metrics_path)[-1]
    assert last["val/bpc"] == pytest.approx(nats / math.log(2) / len("".join(text)), rel=1e-5)
    assert last["val/loss"] > last["val/bpc"]


def test_its_tokenizer_is_there_for_other_software(run: Run) -> None:
    standard = LibraryTokenizer.from_file(str(run.path / "tokenizer.json"))
    ids = tokenizer_from_dict(run.info["tokenizer"]).encode("To be, or not\nto be — 中")
    assert standard.encode("To be, or not\nto be — 中").ids == ids.tolist()
    assert np.asarray(ids).max() < 300


def test_it_samples(run: Run, command: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    assert command(f"run={run.path}", "prompt=To be 中", "max_new_tokens=5", main=sample.main) == 0
    assert capfd.readouterr().out.startswith("To be 中")
    assert command(f"run={run.path}", "prompt=To", "stop=xqx", main=sample.main) == 2
    assert "stop=xqx: is 3 symbols of this vocabulary; allowed: a text that is one" in capfd.readouterr().err
