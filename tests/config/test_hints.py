"""What a mistake's line says after the mistake."""

import pytest

from gptexp.config.hints import hint_of_choice
from gptexp.errors import ending


def test_a_component_that_may_be_another_packages() -> None:
    norms = ["layernorm", "none"]
    assert hint_of_choice("norm", "gain", norms) == "; allowed: layernorm, none; GPTEXP_IMPORT=MODULE finds yours"
    assert hint_of_choice("norm", "layrnorm", norms) == "; did you mean layernorm? allowed: layernorm, none"
    assert hint_of_choice("hardware", "tpu", ["auto", "mps"]) == "; allowed: auto, mps"


def test_an_error_without_a_text_says_where_it_was_raised() -> None:
    with pytest.raises(NotImplementedError) as caught:
        raise NotImplementedError
    status, (line,) = ending(caught.value)
    assert status == 1
    assert line.startswith(f"NotImplementedError: in {__file__}, line ")
    assert ending(ValueError("no such thing")) == (1, ["ValueError: no such thing"])
