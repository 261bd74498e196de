"""Gradient ascent on functions whose top is known."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lrope_gguf.errors import LropeError
from lrope_search.gradient.ascent import Ascent, AscentConfig, Values

TOP = np.array([[0.3, -0.2], [0.0, 0.5]])


def slope(at: Values) -> Values:
    """Of ``-sum((at - TOP) ** 2) / 2``."""
    return TOP - at


def test_it_climbs() -> None:
    ascent = Ascent(np.zeros_like(TOP), AscentConfig(steps=60))
    while not ascent.done:
        ascent.tell(slope(ascent.at))
    assert np.abs(ascent.at - TOP).max() < 0.03


def test_the_first_step_has_the_size_that_was_asked_for() -> None:
    ascent = Ascent(np.zeros(2), AscentConfig(first=0.07, epsilon=0.05))
    ascent.tell(np.array([1.0, -0.05]))
    assert ascent.at == pytest.approx([0.07 / 1.05, -0.07 * 0.05 / 0.1])


def test_what_went_too_far_on_one_context_goes_back_to_the_top_of_a_parabola() -> None:
    """One axis is bent a hundred times as much as the other; the line through two derivatives finds its top."""
    bent = np.array([100.0, 1.0])
    top = np.array([0.02, 0.5])
    for visits in (1, 2):
        ascent = Ascent(np.zeros(2), AscentConfig(steps=8, first=0.1, last=0.1, visits=visits))
        ends = []
        while not ascent.done:
            again = Ascent(np.zeros(2), ascent.config)
            again.restore(json.loads(json.dumps(ascent.state())))
            slope = bent * (top - ascent.at)
            ascent.tell(slope)
            again.tell(slope)
            assert again.state() == ascent.state()
            ends.append(float(ascent.at[0]))
        assert ascent.at[1] > 0.4
        if visits == 2:
            assert ends[1] == pytest.approx(0.02)
            assert max(abs(end - 0.02) for end in ends[1:]) < 0.051
        else:
            assert min(ends) < -0.02  # as far below it as it was above


@pytest.mark.parametrize(
    ("then", "share"),
    [(-0.05, None), (-0.1, None), (-0.2, 0.5), (-1.0, 0.1), (0.3, None)],
    ids=["less against", "as much", "twice as much", "a cliff", "after all"],
)
def test_another_context_may_want_the_opposite(then: float, share: float | None) -> None:
    ascent = Ascent(np.zeros(1), AscentConfig(steps=4, first=0.1, last=0.1, visits=2))
    ascent.tell(np.array([1.0]))
    ascent.tell(np.array([0.5]))
    at = float(ascent.at[0])
    ascent.tell(np.array([-0.1]))  # of the next context: no sign that the last step was too far
    on = float(ascent.at[0])
    assert on > at
    ascent.tell(np.array([then]))
    if share is None:
        assert ascent.at[0] != pytest.approx(at, abs=0.3 * (on - at))
    else:
        assert ascent.at[0] == pytest.approx(at + share * (on - at))


def test_it_stays_within_bounds_and_says_where() -> None:
    ascent = Ascent(np.zeros(2), AscentConfig(steps=40))
    while not ascent.done:
        ascent.tell(np.array([1.0, -1.0]))
    assert ascent.at.tolist() == [0.9, -0.7]
    assert ascent.at_bound.all()


def test_it_goes_on_where_it_was_killed() -> None:
    whole, first = (Ascent(np.zeros_like(TOP)) for _ in range(2))
    for _ in range(7):
        first.tell(slope(first.at), 0.2, np.ones_like(TOP))
    kept = json.loads(json.dumps(first.state()))
    second = Ascent(np.zeros_like(TOP))
    second.restore(kept)
    while not second.done:
        second.tell(slope(second.at), 0.2, np.ones_like(TOP))
    while not whole.done:
        whole.tell(slope(whole.at), 0.2, np.ones_like(TOP))
    assert second.at.tolist() == whole.at.tolist()
    assert second.price == whole.price


@pytest.mark.parametrize(
    "broken", [{}, {"step": 1}, {"step": 1, "price": 0, "at": [0], "mean": [0], "square": [0], "texts": []}]
)
def test_a_damaged_state_is_refused(broken: dict[str, object]) -> None:
    with pytest.raises(LropeError, match="kept state"):
        Ascent(np.zeros(2)).restore(broken)


def test_a_derivative_that_is_not_a_number_moves_nothing() -> None:
    ascent = Ascent(np.zeros(2))
    with pytest.raises(LropeError, match="step 1 of the gradient ascent: a derivative is not a number"):
        ascent.tell(np.array([1.0, np.nan]))
    assert ascent.step == 0
    assert ascent.at.tolist() == [0.0, 0.0]


def test_query_scales_leave_more_of_the_limit() -> None:
    ends = []
    for queries in (np.zeros(2, np.bool_), np.array([False, True])):
        ascent = Ascent(
            np.zeros(2), AscentConfig(steps=60, reserve=0.1, query_reserve=0.5, low=-2.0, high=2.0), queries
        )
        while not ascent.done:
            ascent.tell(np.array([1.0, 0.5]), float((ascent.at**2).sum()), 2.0 * ascent.at)
        ends.append(float((ascent.at**2).sum()))
    assert ends == pytest.approx([0.09, 0.05], rel=0.02)


def test_each_kind_of_text_keeps_the_limit() -> None:
    """Three texts of one kind do not make up for the one of another, whose divergence rises thrice as fast."""
    ascent = Ascent(np.zeros(2), AscentConfig(steps=80, max_divergence=0.1, reserve=0.1))
    while not ascent.done:
        at, text = ascent.at, ascent.step % 4
        strength = 3.0 if text == 3 else 1.0
        ascent.tell(np.array([1.0, 0.5]), strength * float((at**2).sum()), strength * 2.0 * at, text, int(text == 3))
    assert 3.0 * float((ascent.at**2).sum()) == pytest.approx(0.09, rel=0.05)
    again = Ascent(np.zeros(2), ascent.config)
    again.restore(json.loads(json.dumps(ascent.state())))
    assert again.state() == ascent.state()
    old = ascent.state()
    again.restore(old | {"texts": [text[:4] for text in old["texts"]]})
    assert [kind for *_, kind in again.state()["texts"]] == [0, 0, 0, 0]


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_divergence_is_held_at_its_limit(scale: float) -> None:
    """The gain rises evenly, the divergence of two texts with the square: the limit is where the ascent must end."""
    ascent = Ascent(np.zeros(2), AscentConfig(steps=60, max_divergence=0.1, reserve=0.1, epsilon=0.05 * scale))
    worst = 0.0
    while not ascent.done:
        at, strength = ascent.at, (0.5, 1.5)[ascent.step % 2]
        worst = max(worst, float((at**2).sum()))
        ascent.tell(scale * np.array([1.0, 0.5]), strength * float((at**2).sum()), strength * 2.0 * at, ascent.step % 2)
    assert float((ascent.at**2).sum()) == pytest.approx(0.09, rel=0.02)
    assert worst < 0.13
    assert ascent.price > 0.0
