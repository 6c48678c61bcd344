"""N-gram models against counts by hand, and whole runs of them."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from gptexp.errors import UserError
from gptexp.models.counts import Counts, CountsConfig
from gptexp.runs.files import read_metrics
from gptexp.runs.run import Run
from gptexp.training.load import load_model

V = 4
TEXT = [0, 1, 2, 0, 1, 3, 0, 1, 2, 2, 0, 1, 2, 0, 0, 3, 1, 2, 0, 1, 2, 3, 3, 1, 0, 1, 2, 0, 2, 1]


def learned(smoothing: str, order: int, text: Sequence[int] = TEXT) -> Counts:
    model = Counts(CountsConfig(vocab_size=V, order=order, smoothing=smoothing))  # type: ignore[arg-type]
    x, y = torch.tensor([text[:-1]]), torch.tensor([text[1:]])
    model.learn([(x[:, :10], y[:, :10]), (x[:, 10:], y[:, 10:])])
    return model


def grams(n: int) -> Counter[tuple[int, ...]]:
    """What is counted in two rows of x and y: contexts do not reach beyond a row."""
    rows = [TEXT[:11], TEXT[10:]]
    return Counter(tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1) if i + n > 1)


def witten_bell(context: tuple[int, ...], w: int) -> float:
    shorter = witten_bell(context[1:], w) if context else 1 / V
    counts = grams_after(context)
    n, types = sum(counts.values()), len(counts)
    return (counts[w] + types * shorter) / (n + types) if n else shorter


def grams_after(context: tuple[int, ...]) -> Counter[int]:
    if not context:  # the first symbol of a row is no target
        return Counter(w for row in (TEXT[:11], TEXT[10:]) for w in row[1:])
    return Counter({g[-1]: c for g, c in grams(len(context) + 1).items() if g[:-1] == context})


def kneser_ney(context: tuple[int, ...], w: int, order: int) -> float:
    """Chen, Goodman 1999, with one discount for 1, one for 2 and one for 3 and more."""
    shorter = kneser_ney(context[1:], w, order) if context else 1 / V

    def table(n: int) -> Counter[tuple[int, ...]]:
        if n == order:
            return grams(n) if n > 1 else Counter({(w,): c for w, c in grams_after(()).items()})
        return Counter(g[1:] for g in set(grams(n + 1)))

    counts = table(len(context) + 1)
    of = Counter(counts.values())
    n1, n2, n3, n4 = (max(1, of[k]) for k in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    discounts = [0.0, *(max(0.0, d) for d in (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3))]
    here = {g[-1]: c for g, c in counts.items() if g[:-1] == context}
    total = sum(here.values())
    if not total:
        return shorter
    left = sum(discounts[min(3, c)] for c in here.values())
    count = here.get(w, 0)
    return (count - discounts[min(3, count)] + left * shorter) / total


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("smoothing", ["witten_bell", "kneser_ney"])
def test_the_published_formulas(smoothing: str, order: int) -> None:
    model = learned(smoothing, order)
    row = [0, 1, 2, 3, 1, 1, 0, 1]
    p = model(torch.tensor([row])).exp()
    assert p.sum(-1).tolist() == [pytest.approx([1.0] * len(row))]
    for i in range(len(row)):
        context = tuple(row[max(0, i + 2 - order) : i + 1])
        for w in range(V):
            expected = witten_bell(context, w) if smoothing == "witten_bell" else kneser_ney(context, w, order)
            assert float(p[0, i, w]) == pytest.approx(expected, rel=1e-9)


def test_targets_that_are_left_out_are_not_counted() -> None:
    model, whole = Counts(CountsConfig(vocab_size=V, order=2)), learned("witten_bell", 2, [0, 1, 2])
    model.learn([(torch.tensor([[0, 1, 3, 3]]), torch.tensor([[1, 2, -1, -1]]))])
    ids = torch.tensor([[0, 1, 2, 3]])
    assert torch.equal(model(ids), whole(ids))


def test_codes_that_are_too_long() -> None:
    with pytest.raises(UserError, match=r"model\.order=9: too long for 256 symbols; allowed: at most 7"):
        Counts(CountsConfig(vocab_size=256, order=9))


@pytest.mark.parametrize("smoothing", ["witten_bell", "kneser_ney"])
def test_a_run(smoothing: str, command: Callable[..., int], corpus: Path, tmp_path: Path) -> None:
    """It ends after one step, its checkpoint has the counts, and what it writes has its probabilities."""
    settings = ["model=counts", "model.order=3", f"model.smoothing={smoothing}", "model.block_size=64", "logger=none"]
    text = ["data=file", f"data.path={corpus}", f"hydra.run.dir={tmp_path / 'run'}"]
    assert command(*settings, *text) == 0
    run = Run.open(tmp_path / "run")
    before, after = [row["val/loss"] for row in read_metrics(run.metrics_path) if "val/loss" in row]
    vocabulary = len(run.info["tokenizer"]["symbols"])
    assert before == pytest.approx(math.log(vocabulary))
    assert after < 0.6 * before
    assert run.result is not None
    assert run.result["step"] == 1
    model = load_model(run, "last", vocabulary)
    assert isinstance(model, Counts)
    ids = torch.randint(vocabulary, (1, 40), generator=torch.Generator().manual_seed(0))
    written = model.generate(ids.tolist(), 5, temperature=0)[0]
    for i in range(5):
        assert int(model(torch.tensor([[*ids[0].tolist(), *written[:i]]]))[0, -1].argmax()) == written[i]
