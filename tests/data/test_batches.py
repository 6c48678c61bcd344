import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptexp.data.batches import BATCH_STREAM, SPLIT_STREAM, Documents, Split, Windows, chars_per_token, draw
from gptexp.data.encoding import Encoded
from gptexp.data.tokenizers import ByteTokenizer, CharTokenizer
from gptexp.errors import UserError
from tests.data.conftest import cut

SEEDS = st.integers(0, 2**64 - 1)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def text_of(ids: np.ndarray) -> Encoded:
    return Encoded(ids, CharTokenizer("".join(map(chr, range(max(2, int(ids.max()) + 1))))), "")


def documents_of(lines: list[str], end: str = "") -> Encoded:
    tokenizer = CharTokenizer("." + LETTERS, ".")
    ids = tokenizer.encode("\n".join(lines) + end).astype(np.uint8)
    return Encoded(ids, tokenizer, "")


def read(rows, index) -> str:
    """The document in one row, after checking that x, y and mask agree."""
    x, y, mask = rows.x[index], rows.y[index], rows.mask[index]
    n = int(mask.sum())
    assert mask[:n].all()
    assert not x[n:].any()
    assert (y[n:] == -1).all()
    assert x[0] == 0
    assert y[n - 1] == 0
    assert x[1:n].tolist() == y[: n - 1].tolist()
    return "".join(LETTERS[i - 1] for i in x[1:n])


def test_draws_never_change():
    assert draw(1337, 0, 6, 1000).tolist() == [985, 347, 78, 213, 902, 331]
    assert draw(1337, 1, 6, 1000).tolist() == [438, 329, 979, 529, 891, 311]
    assert draw(0, 0, 6, 1000).tolist() == [259, 458, 49, 556, 803, 725]
    assert draw(1337, 0, 6, 1000, stream=1).tolist() == [994, 93, 590, 720, 600, 10]
    large = [3680341880488857208, 4312259345086865020, 663697639099119366]
    assert draw(2**63 + 5, 2**40, 3, 2**62).tolist() == large
    assert (BATCH_STREAM, SPLIT_STREAM) == (0, 1)


@given(SEEDS, st.integers(0, 2**63), st.integers(1, 300), st.integers(1, 2**62))
def test_draws_are_in_range_and_pure(seed, step, count, n):
    drawn = draw(seed, step, count, n)
    assert drawn.dtype == np.int64
    assert drawn.shape == (count,)
    assert drawn.min() >= 0
    assert drawn.max() < n
    assert (draw(seed, step, count, n) == drawn).all()
    assert (draw(seed, step, count + 1, n)[:-1] == drawn).all()


def test_draws_are_uniform_and_share_no_numbers():
    counts = np.bincount(draw(3, 5, 100_000, 10), minlength=10)
    chi2 = ((counts - 10_000) ** 2 / 10_000).sum()
    assert chi2 < 27.9  # 9 degrees of freedom, p = 0.001
    assert len(np.unique([draw(1, step, 5_000, 2**63) for step in range(20)])) == 100_000


@settings(deadline=None)
@given(st.integers(20, 400), st.integers(1, 17), st.floats(0.05, 0.8), SEEDS, st.integers(0, 2**40))
def test_training_windows_stay_in_the_training_split(n, block_size, fraction, seed, step):
    train, val = cut(text_of(np.arange(n)), min(block_size, 3), val_fraction=fraction)
    n_train = n - val.n_tokens  # ids are their own positions, so anything from the validation split shows
    x, y, mask, tokens, _ = train.train_batch(seed, step, 32)
    assert x.dtype == y.dtype == np.int64
    assert x.shape == y.shape == (32, train.width)
    assert (x >= 0).all()
    assert (y == x + 1).all()
    assert (np.diff(x, axis=1) == 1).all()
    assert y.max() < n_train
    assert (mask, tokens) == (None, 32 * train.width)
    again = train.train_batch(seed, step, 32)
    assert (again.x == x).all()
    assert (again.y == y).all()


def test_training_windows_reach_both_ends():
    train, _ = cut(text_of(np.arange(20)), 4, val_fraction=0.5)
    x, y, *_ = train.train_batch(0, 0, 1000)
    assert (x.min(), y.max()) == (0, 9)
    assert sorted(set(x[:, 0].tolist())) == [0, 1, 2, 3, 4, 5]


@settings(deadline=None)
@given(st.integers(2, 300), st.integers(1, 40), st.floats(0.01, 0.99), st.integers(1, 7), st.booleans())
def test_windows_cover_every_target_once(n, block_size, fraction, batch, of_train):
    n_train = min(max(1, round(n * (1 - fraction))), n - 1)
    start, stop = (0, n_train) if of_train and n_train > 1 else (n_train, n)
    split = Windows(np.arange(n), start, stop, block_size)
    targets = []
    for begin in range(0, split.n_rows, batch):
        x, y, mask, tokens, _ = split.rows(np.arange(begin, min(begin + batch, split.n_rows)))
        real = y >= 0
        assert x.shape == y.shape == (len(x), block_size)
        assert (x[real] == y[real] - 1).all()
        assert not x[~real].any()
        assert (y[~real] == -1).all()
        assert tokens == real.sum()
        assert (mask is None) if real.all() else (mask == real).all()
        targets += y[real].tolist()
    assert targets == list(range(max(start, 1), stop))  # the first has the end of the training split as its context
    assert split.n_tokens == len(targets)


@pytest.mark.parametrize("split", [Windows(np.arange(9), 4, 9, 3), None])
def test_filler_rows(split):
    split = split or cut(documents_of(["a", "bcd"]), 9, documents=True, val_fraction=0.5)[0]
    x, y, mask, tokens, _ = split.rows([-1, 0])
    assert not x[0].any()
    assert (y[0] == -1).all()
    assert not mask[0].any()
    assert mask[1].any()
    assert tokens == mask[1].sum()


@pytest.mark.parametrize("n", [1_115_394, 10, 1000])
def test_nanogpt_sizes(n):
    train, val = cut(text_of(np.zeros(n, np.uint8)), 8)
    assert val.n_tokens == n - int(n * 0.9)
    assert train.n_tokens + 1 + val.n_tokens == n
    assert chars_per_token(val, CharTokenizer("ab")) == 1.0


def test_the_share_for_validation_is_not_lost_to_rounding():
    assert cut(text_of(np.arange(10)), 1, val_fraction=0.7)[1].n_tokens == 7
    assert cut(documents_of(["a"] * 10), 2, documents=True, val_fraction=0.9)[0].n_rows == 1


LINES = st.lists(st.text("abcxyz", max_size=9), min_size=2, max_size=40).filter(lambda lines: sum(map(bool, lines)) > 1)


@settings(deadline=None)
@given(LINES, st.sampled_from(["", "\n", "\n\n"]), st.integers(0, 5))
def test_every_document_is_in_one_split_once(lines, end, split_seed):
    splits = cut(documents_of(lines, end), 10, documents=True, val_fraction=0.5, split_seed=split_seed)
    kept = [line for line in lines if line]
    found = []
    for split in splits:
        rows = split.rows(np.arange(split.n_rows))
        assert split.width == max(map(len, kept)) + 1
        assert rows.x.shape == rows.y.shape == rows.mask.shape == (split.n_rows, split.width)
        texts = [read(rows, index) for index in range(split.n_rows)]
        assert split.n_tokens == rows.tokens == (rows.y >= 0).sum() == sum(map(len, texts)) + len(texts)
        found += texts
    assert sorted(found) == sorted(kept)
    assert splits[1].n_rows == len(kept) - len(kept) // 2


@given(st.lists(st.text(LETTERS, max_size=6), min_size=2, max_size=8), st.sampled_from(["", "\n"]), st.integers(1, 4))
def test_contexts_are_those_of_a_loop(lines, end, context):
    """Each target once, after the symbols before it, filled up with the terminator."""
    lines = [*lines, "a", "b"]
    train, val = cut(documents_of(lines, end), 16, documents=True, val_fraction=0.3, context=context)
    whole = cut(documents_of(lines, end), 16, documents=True, val_fraction=0.3)
    expected = [[], []]
    for number, split in enumerate(whole):
        rows = split.rows(np.arange(split.n_rows))
        for row in range(split.n_rows):
            past = "." * context
            for symbol in [*read(rows, row), "."]:
                expected[number].append((past[-context:], symbol))
                past += symbol
    names = "." + LETTERS
    for split, wanted in zip((train, val), expected, strict=True):
        rows = split.rows(np.arange(split.n_rows))
        assert (split.n_tokens, split.n_rows, rows.tokens) == (len(wanted), len(wanted), len(wanted))
        assert (rows.y[:, :-1] == -1).all()
        assert (rows.mask == (rows.y >= 0)).all()
        found = [("".join(names[i] for i in x), names[y]) for x, y in zip(rows.x, rows.y[:, -1], strict=True)]
        assert found == wanted
        batch = split.train_batch(3, 2, 10)
        drawn = [("".join(names[i] for i in x), names[y]) for x, y in zip(batch.x, batch.y[:, -1], strict=True)]
        assert set(drawn) <= set(wanted)
        assert batch.tokens == 10
    filler = train.rows([-1])
    assert not filler.mask.any()
    assert not filler.x.any()
    assert (filler.y == -1).all()


def test_the_shuffle_is_fixed_by_its_seed():
    lines = [letter * 2 for letter in LETTERS]

    def validation(seed: int) -> list[str]:
        val = cut(documents_of(lines), 8, documents=True, split_seed=seed, val_fraction=0.2)[1]
        rows = val.rows(np.arange(val.n_rows))
        return [read(rows, index)[0] for index in range(val.n_rows)]

    assert "".join(validation(1337)) == "lukcxe"
    assert validation(1337) == validation(1337)
    assert validation(1) != validation(1337)


def batches() -> list[Split]:
    windows = cut(text_of(np.arange(100)), 7)[0]
    documents = cut(documents_of([LETTERS[:n] for n in range(1, 20)]), 32, documents=True)[0]
    return [windows, documents]


@settings(deadline=None)
@given(SEEDS, st.integers(0, 2**40), st.integers(1, 4), st.integers(1, 4), st.integers(0, 1))
def test_slices_make_up_the_batch(seed, step, shares, size, which):
    split = batches()[which]
    whole = split.train_batch(seed, step, shares * size)
    parts = [split.train_batch(seed, step, shares * size, slice(i * size, (i + 1) * size)) for i in range(shares)]
    for field in ("x", "y"):
        assert (np.concatenate([getattr(part, field) for part in parts]) == getattr(whole, field)).all()
    assert {part.tokens for part in parts} == {whole.tokens}  # of the whole batch, on every rank
    assert whole.tokens == (whole.y >= 0).sum()


@pytest.mark.parametrize("split", batches(), ids=["windows", "documents"])
def test_batches_differ_between_steps_and_seeds(split):
    x = split.train_batch(1, 1, 8).x
    assert (split.train_batch(1, 2, 8).x != x).any()
    assert (split.train_batch(2, 1, 8).x != x).any()


def test_characters_per_byte():
    text = "aé中😀\nbé\n" * 8
    ids = np.frombuffer(text.encode(), np.uint8)
    val = cut(Encoded(ids, ByteTokenizer(), ""), 5, val_fraction=0.5)[1]
    assert chars_per_token(val, ByteTokenizer()) == pytest.approx(len(text) / len(text.encode()))
    documents = cut(Encoded(ids, ByteTokenizer(), ""), 20, documents=True, val_fraction=0.5)
    n_characters = sum(chars_per_token(split, ByteTokenizer()) * split.n_tokens for split in documents)
    assert n_characters == pytest.approx(len(text))  # each document's newline is its terminator
    rows = documents[0].rows([0])
    assert rows.x[0, 0] == ord("\n")
    assert isinstance(documents[0], Documents)


@pytest.mark.parametrize(
    ("encoded", "config", "block_size", "message"),
    [
        (text_of(np.arange(10)), {}, 9, "model.block_size=9: longer than the training split, 9 tokens; .* 8$"),
        (text_of(np.arange(10)), {"val_fraction": 1e-6}, 2, "data.val_fraction=1e-06: leaves .*at least 0.1$"),
        (documents_of(["abc", "d"]), {"documents": True, "val_fraction": 0.5}, 3, "model.block_size=3: .*least 4$"),
        (documents_of(["abc", "", ""]), {"documents": True}, 8, "task=documents: .* 1 lines .*at least 2$"),
        (documents_of(["a", "b"]), {"documents": True, "val_fraction": 0.9}, 8, "data.val_fraction=0.9: leaves 0 "),
    ],
)
def test_too_little_text(encoded, config, block_size, message):
    with pytest.raises(UserError, match=f"^{message}"):
        cut(encoded, block_size, **config)


def test_just_enough_text():
    train, val = cut(text_of(np.arange(10)), 8)
    assert train.train_batch(0, 0, 3).x.shape == (3, 8)
    assert val.n_rows == 1
