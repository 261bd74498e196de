"""Sizes that fit into a number of tokens, against trying all of them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrope_search.tasks import TokenLimit

STEPS = st.lists(st.integers(0, 30), min_size=1, max_size=80)


@given(STEPS, st.integers(1, 5), st.integers(0, 85), st.integers(-3, 3))
def test_the_largest_size_that_fits_is_found(steps: list[int], low: int, near: int, beside: int) -> None:
    tokens = [0] * low + [5 + total for total in itertools.accumulate(steps)]  # of sizes 0, 1, ...
    high = len(tokens) - 1
    limit = tokens[min(near, high)] + beside
    found = TokenLimit(limit, len).largest(lambda size: "x" * tokens[size], low, high)
    fitting = [size for size in range(low, high + 1) if tokens[size] <= limit]
    assert found == ((fitting[-1], tokens[fitting[-1]]) if fitting else (0, tokens[low]))


@pytest.mark.parametrize(("per_item", "limit"), [(63, 8192), (63, 131_072), (2, 1_000_000), (400, 100_000)])
def test_a_long_prompt_is_counted_a_few_times(per_item: int, limit: int) -> None:
    calls = []

    def prompt(size: int) -> str:
        calls.append(size)
        return "x" * (40 + per_item * size + size // 7 % 3)

    assert TokenLimit(limit, len).largest(prompt, 11, limit)[0] == pytest.approx((limit - 40) / per_item, abs=2)
    assert len(calls) <= 7
