"""Learning-rate schedules against formulas written out by hand."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptexp.training.schedules import WSD, Constant, Cosine, Linear, Step


def test_cosine_is_nanogpts_recipe() -> None:
    # Warm-up over 100 steps to 1e-3, half a cosine down to 1e-4 at step 2000, flat afterwards.
    config = Cosine(warmup_steps=100, decay_steps=2000, min_lr_ratio=0.1)
    for step, expected in [(0, 1e-3 / 101), (99, 1e-3 * 100 / 101), (100, 1e-3), (1050, (1e-3 + 1e-4) / 2),
                           (575, 1e-4 + 0.5 * (1 + math.cos(math.pi / 4)) * 9e-4), (2000, 1e-4), (9999, 1e-4)]:
        assert 1e-3 * config.factor(step, 5000) == pytest.approx(expected, rel=1e-12)


def test_linear_falls_in_a_line() -> None:
    config = Linear(warmup_steps=10, decay_steps=None, min_lr_ratio=0.0)
    assert [config.factor(step, 110) for step in (10, 60, 110)] == pytest.approx([1.0, 0.5, 0.0])


def test_wsd_is_stable_and_then_falls() -> None:
    config = WSD(warmup_steps=10, decay_fraction=0.2, min_lr_ratio=0.5)
    assert {config.factor(step, 100) for step in range(10, 81)} == {1.0}
    assert [config.factor(step, 100) for step in (90, 100)] == pytest.approx([0.75, 0.5])


def test_step_falls_once() -> None:
    config = Step(warmup_steps=2, at=0.25, ratio=0.3)
    assert [config.factor(step, 20) for step in (0, 1, 2, 4, 5, 19)] == pytest.approx([1 / 3, 2 / 3, 1, 1, 0.3, 0.3])


def test_constant_stays() -> None:
    assert [Constant(warmup_steps=1).factor(s, 9) for s in (0, 1, 8)] == [0.5, 1.0, 1.0]


@given(
    st.sampled_from([Constant, Linear, Cosine, WSD]),
    st.integers(0, 50), st.integers(1, 200), st.floats(1e-6, 10),
)  # fmt: skip
def test_never_above_the_peak_and_never_jumping(cls: type, warmup: int, max_steps: int, peak: float) -> None:
    config = cls(warmup_steps=warmup)
    rates = [peak * config.factor(step, max_steps) for step in range(max_steps)]
    assert all(0 <= rate <= peak * (1 + 1e-12) for rate in rates)
    # After warm-up no schedule rises.
    after = rates[warmup:]
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(after))
