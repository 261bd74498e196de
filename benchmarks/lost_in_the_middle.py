"""Where in the context answers are lost: accuracy and log-probability by depth, at several shares of the window.

A length is a share of the context window that the model was trained on, since the effect is said to depend on that
share: strongest up to half of the window, then the beginning is lost and the end is not (Veseli et al., arXiv
2508.07479). Each length is asked with all factors 1 and, with `--curve`, under its factors. Three contrasts, each with
its 95 % interval over contexts, tell a U from a slope: the first bin of ten less the middle four, the last bin less
the middle four, and the mean of both, which is above zero where the middle is lost. Usage:

    python benchmarks/lost_in_the_middle.py MODEL [--window N] [--shares 0.25 0.5 1 2] [--curve FILE] [--output PNG]
        [task and model options as of search]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from learning_curve import MEASURES, over_contexts
from numpy.typing import NDArray
from options import add_model_options, add_task_options, model_of, task_of

from lrope_gguf.commands.write import curve_for
from lrope_gguf.errors import LropeError
from lrope_gguf.files import atomic_write_bytes
from lrope_gguf.model_info import read_model
from lrope_gguf.plot import COLOURS, drawing, picture_kind, rendered
from lrope_search import measure
from lrope_search.report.pictures import wilson
from lrope_search.results.comparison import Comparison
from lrope_search.scores import ContextScore

BINS = 10
MIDDLE = range(3, 7)
"""The bins that are the middle."""
CONTRASTS = ("start - middle", "end - middle", "U")


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


def contrasts(scores: Sequence[ContextScore]) -> NDArray[np.float64]:
    """Return `CONTRASTS` of each context, in accuracy and in log-probability, shape (3, 2, contexts).

    Raises:
        LropeError: a context asks nothing at its start, in its middle or at its end.
    """
    found = []
    for score in scores:
        where, values = bins([probe.depth for probe in score.probes]), answers(score)
        parts = [np.isin(where, part) for part in ([0], [BINS - 1], list(MIDDLE))]
        if not all(part.any() for part in parts):
            raise LropeError(
                f"--probes: context {score.index} asks nothing at an end or in the middle; give at least {BINS}"
            )
        start, end, middle = (values[:, part].mean(axis=1) for part in parts)
        found.append([start - middle, end - middle, (start + end) / 2.0 - middle])
    return np.array(found).transpose(1, 2, 0)


@dataclass(frozen=True)
class Length:
    """What was asked at one length, by side: profiles, totals and the contrasts with their intervals.

    ``change``: of each side but the base, how much larger its U is.
    """

    share: float
    tokens: int
    n_contexts: int
    profiles: Mapping[str, NDArray[np.float64]]
    totals: Mapping[str, NDArray[np.float64]]
    contrasts: Mapping[str, Sequence[Comparison]]
    change: Mapping[str, Comparison]


def length_of(share: float, tokens: int, scores: Mapping[str, Sequence[ContextScore]]) -> Length:
    """Summarise the answers at a length; the first side is the base."""
    found = {name: contrasts(side) for name, side in scores.items()}
    (base, _), *others = found.items()
    return Length(
        share,
        tokens,
        len(scores[base]),
        {name: profile(side) for name, side in scores.items()},
        {name: np.mean([answers(one).mean(axis=1) for one in side], axis=0) for name, side in scores.items()},
        {name: [over_contexts(contrast) for contrast in three] for name, three in found.items()},
        {name: over_contexts(three[-1] - found[base][-1]) for name, three in others},
    )


def rows(length: Length, measure_index: int) -> list[str]:
    """Return a length's rows of the table in one measure, 0 for accuracy, 1 for log-probability."""
    scale, _, _ = list(MEASURES.values())[measure_index]
    digits = (0, 1) if measure_index == 0 else (2, 2)
    lines = []
    for name, profiles in length.profiles.items():
        means = [*(f"{scale * v:.{digits[0]}f}" for v in profiles[measure_index]),
                 f"{scale * length.totals[name][measure_index]:.{digits[1]}f}"]  # fmt: skip
        told = [_interval(one, measure_index, scale, digits[1]) for one in length.contrasts[name]]
        change = _interval(length.change[name], measure_index, scale, digits[1]) if name in length.change else ""
        lines.append(f"| {100 * length.share:g} % | {length.tokens} | {name} | {' | '.join((*means, *told, change))} |")
    return lines


def _interval(found: Comparison, measure_index: int, scale: float, digits: int) -> str:
    one = (found.accuracy_gain, found.log_probability_gain)[measure_index]
    mean, low, high = (f"{scale * value:+.{digits}f}" for value in (one.mean, one.low, one.high))
    return f"{mean} [{low}, {high}]" if found.enough else mean


def draw(path: str, lengths: Sequence[Length], title: str) -> None:
    """Draw accuracy by depth into a PNG or SVG file, a panel a length, with each bin's 95 % interval (Wilson's)."""
    kind = picture_kind(path)
    from matplotlib.figure import Figure

    columns = min(4, len(lengths))
    n_rows = -(-len(lengths) // columns)
    with drawing("lrope-depth", font_size=9.0):
        figure = Figure(figsize=(2.4 * columns, 0.5 + 2.2 * n_rows), layout="constrained")
        panels = figure.subplots(n_rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        middles = (np.arange(BINS) + 0.5) / BINS
        for axes, length in zip(panels, lengths, strict=False):
            for name, profiles in length.profiles.items():
                ends = [wilson(float(share), length.n_contexts) for share in profiles[0]]
                low, high = (
                    [100.0 * end for end in side] for side in zip(*((e.low, e.high) for e in ends), strict=True)
                )
                colour = COLOURS["base" if name == "base" else "curve"]
                axes.plot(middles, 100.0 * profiles[0], color=colour, marker="o", markersize=3, label=name,
                          linestyle="--" if name == "base" else "-", clip_on=False)  # fmt: skip
                axes.fill_between(middles, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.set_title(f"{100 * length.share:g} % of the window")
            axes.set_ylim(0, 100)
        for axes in panels[len(lengths) :]:
            axes.set_visible(False)
        figure.supxlabel("depth of the answer (0 first, 1 last)")
        figure.supylabel("accuracy, %")
        panels[0].legend(loc="lower left")
        figure.suptitle(title)
        picture = rendered(figure, kind)
    atomic_write_bytes(path, picture)


def main() -> None:
    """Print the table of accuracy as it comes, then that of log-probability."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--window", metavar="N", type=int, help="tokens that it was trained on (what its file says)")
    parser.add_argument("--shares", metavar="S", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--curve", metavar="FILE", help="factors to hold against none")
    parser.add_argument("--contexts", metavar="N", type=int, default=30, help="of each length (%(default)s)")
    parser.add_argument("--output", metavar="PNG", help="a picture")
    add_model_options(parser)
    add_task_options(parser)
    args = parser.parse_args()
    model, task = model_of(args), task_of(args)
    lengths = []
    try:
        if args.output is not None:
            picture_kind(args.output)
        info = read_model(model.path)
        window = args.window or info.context_length
        if window is None or window < 1 or min(args.shares) <= 0.0 or args.contexts < 1:
            raise LropeError("--window, --shares, --contexts: give numbers above 0")
        sides = {} if args.curve is None else {"curve": curve_for(args.curve, info)[1]}
        heads = ("window", "tokens", "side", *(f"{(i + 0.5) / BINS:.2f}" for i in range(BINS)), "all", *CONTRASTS,
                 "U - base's")  # fmt: skip
        header = f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}"
        print(f"accuracy, %, by depth; contrasts in points; {args.contexts} contexts a length\n\n{header}", flush=True)
        for share in args.shares:
            tokens = round(share * window)
            found = measure(model, replace(task, context_tokens=tokens), sides, contexts=args.contexts)
            lengths.append(length_of(share, tokens, found.scores))
            print("\n".join(rows(lengths[-1], 0)), flush=True)
            each = args.contexts * len(found.sides)
            print(f"{share:g}: {found.table.n_probes / args.contexts:.0f} questions a context, "
                  f"{found.seconds / each:.2f} s a context and side, {found.n_tokens / found.seconds:.0f} tokens/s",
                  file=sys.stderr, flush=True)  # fmt: skip
        print(f"\nlog-probability, nats a token, by depth\n\n{header}")
        print("\n".join(line for length in lengths for line in rows(length, 1)))
        if args.output is not None:
            draw(args.output, lengths, info.name or info.path.stem)
            print(f"\n{args.output}: written")
    except LropeError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
