import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptexp.data.tokenizers import ByteTokenizer, CharTokenizer, tokenizer_from_dict
from gptexp.errors import UserError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@given(TEXT)
def test_round_trip(text):
    """Of the text, and of the description of the tokenizer."""
    chars = CharTokenizer("".join(sorted(set(text))))
    assert chars.vocab_size == len(set(text))
    for tokenizer, expected in ((chars, [chars.symbols.index(c) for c in text]), (ByteTokenizer(), [*text.encode()])):
        ids = tokenizer.encode(text)
        assert (ids.dtype, ids.tolist()) == (np.int64, expected)
        assert tokenizer.decode(ids) == text
        again = tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())))
        assert type(again) is type(tokenizer)
        assert again.encode(text).tolist() == expected


def test_terminator_stands_for_the_newline():
    tokenizer = CharTokenizer(".ab", terminator=".")
    assert tokenizer.encode("\na.b\n").tolist() == [0, 1, 0, 2, 0]
    assert tokenizer.decode([0, 1, 0]) == ".a."


@pytest.mark.parametrize(
    ("text", "message"), [("ROM§", "'§' (U+00A7) at position 3"), ("\n", "'\\n' (U+000A) at posi")]
)
def test_unknown_character_is_named(text, message):
    with pytest.raises(UserError) as caught:
        CharTokenizer("MOR").encode(text, what="start")
    [problem] = caught.value.problems
    assert problem.startswith(f"start character {message}")
    assert problem.endswith("is not in the vocabulary of 3 characters")


def test_half_a_surrogate_pair_is_a_mistake_too():
    for tokenizer in (CharTokenizer("ab"), ByteTokenizer()):
        with pytest.raises(UserError, match=r"U\+DC80\) at position 1"):
            tokenizer.encode("a\udc80")


def test_bytes_that_are_not_utf8_are_replaced():
    assert ByteTokenizer().decode([0x61, 0xFF, 0x62]) == "a\ufffdb"


@pytest.mark.parametrize("tokenizer", [CharTokenizer("ab"), ByteTokenizer()])
def test_ids_outside_the_vocabulary(tokenizer):
    for ids in ([-1], [0, tokenizer.vocab_size]):
        with pytest.raises(ValueError, match="the vocabulary has 0 to"):
            tokenizer.decode(ids)
    assert tokenizer.decode([]) == ""


CHAR = {"name": "char", "symbols": "ab", "terminator": "\n"}


@pytest.mark.parametrize(
    "data",
    [
        None, [], {}, "char", {"name": "bpe"}, {"name": "byte", "symbols": "a"}, {"name": "char", "symbols": "ab"},
        *(CHAR | {"symbols": symbols} for symbols in ("", "ba", "aa", ["a"], "\ud800")),
        CHAR | {"terminator": "."}, CHAR | {"symbols": "\n.", "terminator": "."}, CHAR | {"terminator": ""},
        CHAR | {"_target_": "os.system"},
    ],
)  # fmt: skip
def test_garbage_is_refused(data):
    with pytest.raises(UserError, match=r"^tokenizer="):
        tokenizer_from_dict(data)
