"""Where in the context answers are lost: accuracy and log-probability by depth, at several shares of the window.

A length is a share of the context window that the model was trained on, since the effect is said to depend on that
share: strongest up to half of the window, then the beginning is lost and the end is not (Veseli et al., arXiv
2508.07479). Each length is asked with all factors 1 and, with `--curve`, under its factors. Three contrasts, each with
its 95 % interval over contexts, tell a U from a slope: the first bin of ten less the middle four, the last bin less
the middle four, and the mean of both, which is above zero where the middle is lost. Usage:

    python research/lost_in_the_middle.py MODEL [--window N] [--shares 0.25 0.5 1 2] [--curve FILE]
        [task and model options as of search]
    python research/lost_in_the_middle.py --study DIR --window N --shares S

`--study` takes the answers of a kept study's test, or those of `eval --study`, in place of a model's: the one length
that S says.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from learning_curve import LEAST, MEASURES, kept, over_contexts
from numpy.typing import NDArray
from options import add_model_options, add_task_options, head, model_of, row, task_of

from lrope_gguf.errors import LropeError
from lrope_gguf.model_info import read_model
from lrope_search import measure
from lrope_search.commands.curve_files import factors_of_curve
from lrope_search.results.intervals import Interval
from lrope_search.scores import ContextScore

BINS = 10
MIDDLE = range(3, 7)
"""The bins that are the middle."""
CONTEXTS = 30
CONTRASTS = ("start - middle", "end - middle", "U")
CHANGES = ("U, change", "middle, change")


def bins(depths: Sequence[float]) -> NDArray[np.int_]:
    """Return of each depth, 0 to 1, which of ten equal bins it lies in; 1 lies in the last."""
    return np.minimum(np.floor(np.asarray(depths, np.float64) * BINS + 1e-9), BINS - 1).astype(np.int_)


def answers(score: ContextScore) -> NDArray[np.float64]:
    """Return a context's correctness (0 to 1) and log-probabilities, shape (2, probes)."""
    return np.array([(float(probe.correct), probe.log_probability) for probe in score.probes]).T


def profile(scores: Sequence[ContextScore]) -> NDArray[np.float64]:
    """Return accuracy and log-probability by bin, shape (2, bins); NaN where a bin has no probe."""
    where = bins([probe.depth for score in scores for probe in score.probes])
    values = np.concatenate([answers(score) for score in scores], axis=1)
    with np.errstate(invalid="ignore"):
        return np.array([np.bincount(where, row, BINS) / np.bincount(where, minlength=BINS) for row in values])


def parts(scores: Sequence[ContextScore]) -> NDArray[np.float64]:
    """Return each context's start, end and middle, in accuracy and in log-probability, shape (3, 2, contexts)."""
    found = []
    for score in scores:
        where, values = bins([probe.depth for probe in score.probes]), answers(score)
        chosen = [np.isin(where, part) for part in ([0], [BINS - 1], list(MIDDLE))]
        if not all(part.any() for part in chosen):
            raise LropeError(f"--probes: context {score.index} asks nothing at an end or in the middle; give {BINS}")
        found.append([values[:, part].mean(axis=1) for part in chosen])
    return np.array(found).transpose(1, 2, 0)


def contrasts(of_parts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return `CONTRASTS` of what `parts` returns, in the same shape."""
    start, end, middle = of_parts
    return np.array([start - middle, end - middle, (start + end) / 2.0 - middle])


@dataclass(frozen=True)
class Length:
    """What was asked at one length, by side: means by bin and over all, and contrasts with their intervals.

    ``changes``: of each side but the base, how much larger its U is, and how much better its middle.
    """

    share: float
    tokens: int
    n_contexts: int
    profiles: Mapping[str, NDArray[np.float64]]
    totals: Mapping[str, NDArray[np.float64]]
    contrasts: Mapping[str, Sequence[tuple[Interval, Interval]]]
    changes: Mapping[str, Sequence[tuple[Interval, Interval]]]


def length_of(share: float, tokens: int, scores: Mapping[str, Sequence[ContextScore]]) -> Length:
    """Summarise the answers at a length; the first side is the base."""
    found = {name: parts(side) for name, side in scores.items()}
    changes = {name: side - next(iter(found.values())) for name, side in found.items()}
    base, *others = found
    return Length(
        share, tokens, len(scores[base]),
        {name: profile(side) for name, side in scores.items()},
        {name: np.mean([answers(one).mean(axis=1) for one in side], axis=0) for name, side in scores.items()},
        {name: [over_contexts(one) for one in contrasts(side)] for name, side in found.items()},
        {name: [over_contexts(contrasts(changes[name])[2]), over_contexts(changes[name][2])] for name in others},
    )  # fmt: skip


def rows(length: Length, index: int) -> list[str]:
    """Return a length's rows of the table in one measure, 0 for accuracy, 1 for log-probability."""
    scale, _, digits = list(MEASURES.values())[index]
    lines = []
    for name, profiles in length.profiles.items():
        cells = [f"{100 * length.share:g} %", str(length.tokens), name]
        cells += [f"{scale * value:.{digits if index else 0}f}" for value in profiles[index]]
        cells.append(f"{scale * length.totals[name][index]:.{digits}f}")
        told = [*length.contrasts[name], *length.changes.get(name, ())]
        cells += [_gain(one[index], length.n_contexts >= LEAST, scale, digits) for one in told]
        cells += [""] * (0 if name in length.changes else len(CHANGES))
        lines.append(row(cells))
    return lines


def _gain(gain: Interval, enough: bool, scale: float, digits: int) -> str:
    ends = f" [{scale * gain.low:+.{digits}f}, {scale * gain.high:+.{digits}f}]" if enough else ""
    return f"{scale * gain.mean:+.{digits}f}{ends}"


def of_study(args: argparse.Namespace) -> Iterator[Length]:
    share = args.shares[0]
    yield length_of(share, round(share * args.window), kept(args.study, args.contexts)[1])


def of_model(args: argparse.Namespace) -> Iterator[Length]:
    """Ask a model at each length; what a context takes goes to the standard error."""
    model, task, info = model_of(args), task_of(args), read_model(args.model)
    window = args.window or info.context_length
    if window is None:
        raise LropeError(f"{args.model}: does not say how long its contexts were; give --window")
    sides = {} if args.curve is None else {"curve": factors_of_curve(args.curve, info)}
    contexts = CONTEXTS if args.contexts is None else args.contexts
    for share in args.shares:
        tokens = round(share * window)
        found = measure(model, task.but(context_tokens=tokens), sides, contexts=contexts)
        yield length_of(share, tokens, found.scores)
        each = found.seconds / contexts / len(found.sides)
        print(
            f"{share:g}: {each:.3g} s a context and side, {found.n_tokens / found.seconds:.0f} tokens/s",
            file=sys.stderr,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", nargs="?")
    parser.add_argument("--study", metavar="DIR", type=Path, help="take the answers of a kept study's test")
    parser.add_argument("--window", metavar="N", type=int, help="tokens that it was trained on (what its file says)")
    parser.add_argument("--shares", metavar="S", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--curve", metavar="FILE", help="factors to hold against none")
    parser.add_argument("--contexts", metavar="N", type=int, help=f"of each length ({CONTEXTS}; of a study all)")
    add_model_options(parser)
    add_task_options(parser)
    parser.set_defaults(probes=BINS)
    args = parser.parse_args()
    if (args.model is None) == (args.study is None):
        parser.error("give either MODEL or --study")
    if args.study is not None and (args.window is None or len(args.shares) != 1):
        parser.error("--study: needs --window and one of --shares")
    heads = ("window", "tokens", "side", *(f"{(i + 0.5) / BINS:.2f}" for i in range(BINS)), "all", *CONTRASTS,
             *CHANGES)  # fmt: skip
    lengths = []
    try:
        given = [n for n in (args.window, args.contexts) if n is not None]
        if min(given, default=1) < 1 or min(args.shares) <= 0.0:
            raise LropeError("--window, --shares, --contexts: give numbers above 0")
        print(f"accuracy, %, by depth; contrasts in points\n\n{head(*heads)}", flush=True)
        for length in of_study(args) if args.study is not None else of_model(args):
            lengths.append(length)
            print("\n".join(rows(length, 0)), flush=True)
        print(f"\nlog-probability, nats a token, by depth\n\n{head(*heads)}")
        print("\n".join(line for length in lengths for line in rows(length, 1)))
    except LropeError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
