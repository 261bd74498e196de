"""How much of a context fits into a number of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from lrope_gguf.errors import LropeError

Count: TypeAlias = Callable[[str], int]
"""The tokens of a prompt, with all that a model's chat template adds."""

_SECANTS = 8  # guesses after which a size is halved instead, should tokens not grow evenly


@dataclass(frozen=True)
class TokenLimit:
    """At most ``tokens`` tokens a prompt, as ``count`` counts them."""

    tokens: int
    count: Count

    def fitting(
        self,
        prompt: Callable[[int], str],
        low: int,
        high: int,
        too_small: Callable[[int], str],
        too_large: Callable[[int], str],
    ) -> int:
        """Return the `largest` size that fits.

        Raises `LropeError`: not even ``low`` does, or ``high`` leaves room for more; the last two say so, by the tokens
        that it takes.
        """
        size, n_tokens = self.largest(prompt, low, high)
        if not size:
            raise LropeError(f"--context-tokens {self.tokens}: {too_small(n_tokens)}")
        if size == high and self.tokens - n_tokens > n_tokens / size:
            raise LropeError(f"--context-tokens {self.tokens}: {too_large(n_tokens)}")
        return size

    def largest(self, prompt: Callable[[int], str], low: int, high: int) -> tuple[int, int]:
        """Return the largest size from ``low`` (1 or more) to ``high`` whose prompt fits, and that prompt's tokens.

        0 and the tokens of size ``low`` if not even that fits. A larger size must not have fewer tokens. Tokens grow
        almost evenly with size, so that the line through the last two guesses leads near: a long prompt is counted
        about five times.
        """
        last, previous = (low, self.count(prompt(low))), (0, 0)
        if last[1] > self.tokens:
            return 0, last[1]
        best, too_large = last, high + 1
        guesses = 0
        while too_large - best[0] > 1:
            slope = (last[1] - previous[1]) / (last[0] - previous[0])  # no size is tried twice
            step = int((self.tokens - last[1]) // slope) if slope > 0.0 else high
            guess = last[0] + step if guesses < _SECANTS else (best[0] + too_large) // 2
            guess = min(max(guess, best[0] + 1), too_large - 1)
            previous, last = last, (guess, self.count(prompt(guess)))
            if last[1] <= self.tokens:
                best = last
            else:
                too_large = guess
            guesses += 1
        return best
