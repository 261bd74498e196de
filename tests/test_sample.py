"""How many questions a search asks: the cost model, and the variance that it stands on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrope_search import SearchConfig
from lrope_search.results.variation import components, typical, variation_text
from lrope_search.sample import ERRORS, SPREAD, Components, cheapest, default_contexts, default_probes
from lrope_search.scores import ContextScore, ProbeScore


def scored(rows: Sequence[Sequence[float]]) -> list[ContextScore]:
    return [
        ContextScore("search", i, tuple(ProbeScore(k / 9, float(v), False) for k, v in enumerate(row)), 1, 1.0)
        for i, row in enumerate(rows)
    ]


@given(
    st.floats(0.01, 10.0), st.floats(0.0, 1.0), st.floats(0.05, 2.0), st.integers(1, 60),
    st.floats(1.0, 1e4), st.floats(0.1, 100.0), st.integers(1, 8),
)  # fmt: skip
def test_the_sample_is_the_cheapest_that_is_good_enough(
    within: float, between: float, error: float, places: int, context: float, probe: float, least: int
) -> None:
    found = Components(within, between)
    contexts, probes = cheapest(found, error, places=places, context_cost=context, probe_cost=probe, least=least)
    assert least <= contexts and 1 <= probes <= places
    assert found.standard_error(contexts, probes) <= error * (1 + 1e-6)
    cost = contexts * (context + probes * probe)
    for n in range(1, places + 1):  # nothing cheaper is good enough
        most = math.ceil(cost * (1 - 1e-9) / (context + n * probe)) - 1  # contexts of n probes that cost less
        assert most < least or found.standard_error(most, n) > error * (1 - 1e-6)


@given(st.integers(1, 2000))
def test_the_defaults_see_a_gain_worth_finding(places: int) -> None:
    probes = default_probes(places)
    assert 1 <= probes <= places
    for split, error in ERRORS.items():
        assert SPREAD / math.sqrt(default_contexts(split, probes) * probes) <= error * (1 + 1e-9)


def test_long_contexts_are_read_once_for_a_candidate() -> None:
    """Between contexts nothing varies on a real model: more probes of one context are cheaper than another context."""
    assert (default_probes(100), default_contexts("search", 53)) == (53, 1)
    assert (default_probes(40), default_contexts("search", 27)) == (27, 2)
    assert default_contexts("test", 1000) == 8  # fewer clusters make no interval
    with pytest.raises(ValueError, match="standard error of 0"):
        cheapest(Components(1.0, 0.0), 0.0, places=1, context_cost=1.0, probe_cost=1.0)


def test_settings_are_settled_once_the_questions_are_known() -> None:
    settled = SearchConfig(test_contexts=5).settled(27)
    assert [settled.n_contexts(split) for split in ("search", "validation", "test")] == [2, 8, 5]
    assert settled.settled(53) == settled  # what is a number stays
    few = SearchConfig().settled(27, {"search": 1, "validation": None, "test": 3})
    assert (few.search_contexts, few.validation_contexts, few.test_contexts) == (1, 8, 3)
    assert SearchConfig().n_contexts("search") == 1


def test_variance_components_of_known_data() -> None:
    rng = np.random.default_rng(3)
    contexts, probes = 4000, 12
    base = rng.normal(size=(contexts, probes))
    other = base + 0.3 + 0.5 * rng.normal(size=(contexts, 1)) + 2.0 * rng.normal(size=(contexts, probes))
    found = components(scored(base), scored(other))
    assert found is not None and found.between is not None
    assert found.within == pytest.approx(4.0, rel=0.03)
    assert found.between == pytest.approx(0.25, rel=0.15)
    # the standard error that they predict is the one that means over few contexts have
    means = (other - base).reshape(1000, 4, probes).mean(axis=(1, 2))
    assert found.standard_error(4, probes) == pytest.approx(means.std(), rel=0.1)


def test_variance_components_by_hand() -> None:
    # differences 1, 3 and 4, 6, 8: means 2 and 6, within (2 + 8) / 3; n0 = (5 - 13 / 5) / 1
    found = components(scored([[0.0, 0.0], [0.0, 0.0, 0.0]]), scored([[1.0, 3.0], [4.0, 6.0, 8.0]]))
    assert found is not None
    assert found.within == pytest.approx(10 / 3)
    grand = 22 / 5
    assert found.between == pytest.approx((2 * (2 - grand) ** 2 + 3 * (6 - grand) ** 2 - 10 / 3) / 2.4)
    same = components(scored([[0.0, 0.0]] * 3), scored([[1.0, -1.0]] * 3))
    assert same == Components(2.0, 0.0)  # below 0 it is 0
    assert components(scored([[0.0, 0.0]]), scored([[1.0, 3.0]])) == Components(2.0, None)


def test_what_has_no_components() -> None:
    assert components([], []) is None
    assert components(scored([[0.0]]), scored([[1.0]])) is None
    assert components(scored([[0.0, 0.0]]), scored([[1.0, -math.inf]])) is None
    assert typical([(scored([[0.0]]), scored([[1.0]]))]) is None
    sides = [(scored([[0.0, 0.0]]), scored([[-k, k]])) for k in (1.0, 2.0, 100.0)]
    assert typical(sides) == Components(8.0, None)  # a ruined model among them does not matter


def test_it_is_said_in_words() -> None:
    assert variation_text(Components(0.0036, 0.0), 1, 53) == (
        "candidate minus base: standard deviation 0.06 nats over the questions of a context, 0 between contexts; "
        "1 context of 53 questions measure a gain to 0.0082 nats (standard error)"
    )
