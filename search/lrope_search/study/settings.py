"""The settings of a search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from lrope_gguf.curve import DEFAULT_BOUNDS, Curve, Point
from lrope_gguf.errors import LropeError
from lrope_gguf.rope_scaling import MAX_FACTOR

from ..optimizers.settings import LAG, OPTIMIZERS, PARAMETRIZATIONS, UNIFORM_FACTORS, OptimizerConfig, optimizer_config
from ..sample import SPLITS, default_contexts, default_probes
from ..scores import SCALES, Factors, Tuned, numbers_of, read_factors, rows_of, tuned
from ..settings import SettingError, Settings, setting
from .racing import Racing

ControlPoints: TypeAlias = tuple[Point, ...]
Start: TypeAlias = ControlPoints | Factors
"""What a search may begin with: the control points of a curve, or a factor for each layer, with what heads have."""

METHODS = ("both", "gradient", "genetic")
"""What proposes candidates: derivatives, a genetic search (or the other algorithm that was asked for), or that after
these."""

_AS_NEEDED = "chosen to detect a useful gain, by the questions per context"
_MANY = 8
"""Search contexts of a task from which on racing pays (research/algorithms.md)."""
_GOES_ON = 0.3
"""Share of the candidates that sees more contexts then."""


@dataclass(frozen=True)
class SearchConfig(Settings):
    """How to search. All but ``max_hours`` decide the result together with model and task.

    ``max_hours`` is the one thing that depends on time. Contexts of each split have indices from 0. The best uniform
    factor goes on to validation beside the finalists.

    Args:
        algorithm: What proposes candidates: a name of `OPTIMIZERS`, or its settings (`optimizer_config`).
        start: What to begin with, within these bounds; of ``parametrization="bezier"`` curves of this degree.

    Raises:
        LropeError: a value out of range.
    """

    seed: int = 0
    max_evaluations: int = setting(
        120, "candidates to try; give more to continue a finished study", metavar="N", least=1, option=True
    )
    max_hours: float | None = setting(
        None, "start no new candidate after this many hours", metavar="H", above=0.0, unset="no limit"
    )
    method: str | None = setting(
        None, "what proposes factors: derivatives of the answers' probability (gradient), trial and selection "
        "(genetic), or first the one and then the other (both)", metavar="NAME", choices=METHODS, option=True,
        unset="both where torch is installed, else genetic",
    )  # fmt: skip
    gradient_steps: int = setting(20, "steps that follow derivatives", metavar="N", least=1)
    gradient_starts: int = setting(
        1, "how often to make these: from what --start gives or the base model, then from places near it by chance",
        metavar="N", least=1,
    )  # fmt: skip
    gradient_visits: int = setting(
        1, "steps that look at one context; with 2 or more, a factor that went too far there goes back",
        metavar="N", least=1,
    )  # fmt: skip
    scale: str = setting(
        SCALES[0], "what these scale: positions of layers, of KV heads (heads), queries of heads (queries), or the "
        "last two (both); all but the first without a genetic search", choices=SCALES,
    )  # fmt: skip
    search_contexts: int | None = setting(
        None, "contexts to compare candidates on", metavar="N", least=1, unset=_AS_NEEDED
    )
    validation_contexts: int | None = setting(
        None, "contexts to choose the winner on", metavar="N", least=1, unset=_AS_NEEDED
    )
    test_contexts: int | None = setting(None, "contexts to measure on", metavar="N", least=1, unset=_AS_NEEDED)
    finalists: int = setting(4, "best candidates that go on to validation", metavar="N", least=1)
    racing_first: int | None = setting(
        None, "contexts that every candidate is scored on first, if racing is on", metavar="N", least=1,
        unset="an eighth of search_contexts",
    )  # fmt: skip
    racing_fraction: float | None = setting(
        None, "share of the candidates that go on to more contexts; 1: no racing", metavar="F", above=0.0, most=1.0,
        unset=f"{_GOES_ON} from {_MANY} search contexts of a task on, else 1",
    )  # fmt: skip
    middle_weight: float = setting(
        0.0, "count answers in the middle of a context 1 + W times as much as at its ends", metavar="W", least=0.0
    )
    algorithm: str | OptimizerConfig = "ga"
    parametrization: str = setting(
        PARAMETRIZATIONS[0], "both: a curve over all layers with own factors of the few that a scan finds to matter; "
        "bezier: the curve alone; layers: own factors alone", choices=PARAMETRIZATIONS,
    )  # fmt: skip
    degree: int = setting(3, "degree of the Bézier curve", metavar="N", least=1)
    bounds: tuple[float, float] = setting(
        DEFAULT_BOUNDS, "smallest and largest factor, around 1 and from 1/1024 to 1024", metavar="LOW,HIGH"
    )
    uniform_factors: tuple[float, ...] = setting(
        UNIFORM_FACTORS, "uniform scalings that are tried first", metavar="F,...", above=0.0
    )
    max_kl: float = setting(
        0.1, "reject candidates with a larger KL divergence from the base model on ordinary text, in nats per token",
        metavar="NATS", least=0.0, option=True,
    )  # fmt: skip
    confidence: float = setting(0.95, "level of the bootstrap intervals, below 1", metavar="P", above=0.0, most=0.9999)
    start: tuple[Start, ...] = field(default=())
    guard_text: str | None = setting(
        None, "file with ordinary text for max_kl", metavar="FILE", unset="the base model writes some"
    )

    def check(self) -> None:
        """Refuse a seed, bounds or an algorithm that cannot be, and starts that no candidate could be."""
        if not isinstance(self.seed, int) or self.seed < 0:
            raise SettingError(("seed",), f"--seed {self.seed}", "give a whole number, 0 or more")
        if isinstance(self.algorithm, str):
            object.__setattr__(self, "algorithm", optimizer_config(self.algorithm))
        if len(self.bounds) != 2:
            raise self.wrong("give two numbers such as 0.5,4", "bounds")
        low, high = self.bounds
        if not (1.0 / MAX_FACTOR <= low <= 1.0 <= high <= MAX_FACTOR and low < high):
            raise self.wrong("give two numbers around 1, from 1/1024 to 1024", "bounds")
        for start in self.start:
            self.started(start)

    @property
    def optimizer(self) -> OptimizerConfig:
        """The optimizer's settings."""
        assert isinstance(self.algorithm, OptimizerConfig)  # a name became one when these settings were made
        return self.algorithm

    @property
    def ascends(self) -> bool:
        """Whether derivatives propose candidates; only if it is settled that they can."""
        return self.method in ("both", "gradient")

    @property
    def n_steps(self) -> int:
        """Steps that follow derivatives, of all starts."""
        return self.gradient_steps * self.gradient_starts if self.ascends else 0

    def n_contexts(self, split: str) -> int:
        """Return the contexts of ``split``; if they are None still, those of a long context (`settled`)."""
        contexts: int | None = getattr(self, f"{split}_contexts")
        return default_contexts(split, default_probes(2**10)) if contexts is None else contexts

    def racing(self, n_tasks: int = 1) -> Racing:
        """Return the racing rule, by which everybody sees a context of each task first."""
        contexts = self.n_contexts("search")
        fraction, first = self.racing_fraction, self.racing_first
        if fraction is None:
            fraction = _GOES_ON if contexts >= _MANY * n_tasks else 1.0
        if first is None:
            first = contexts // _MANY
        return Racing(contexts, max(first, n_tasks), fraction)

    def settled(
        self,
        probes: int,
        sizes: Mapping[str, int | None] | None = None,
        n_tasks: int = 1,
        kept: Mapping[str, Any] | None = None,
    ) -> SearchConfig:
        """Return these settings with numbers in place of None.

        Args:
            probes: Questions of a context.
            sizes: The contexts that there are of each split; None: as many as wanted.
            n_tasks: Tasks that take turns, each of which is to show its gain.
            kept: ``config.json`` of the study that is to go on, whose derived numbers stay; None: it is yet to begin.
        """
        numbers: dict[str, Any] = {}
        for split in SPLITS:
            if getattr(self, f"{split}_contexts") is None:
                most = (sizes or {}).get(split)
                wanted = n_tasks * default_contexts(split, probes)
                numbers[f"{split}_contexts"] = wanted if most is None else max(1, min(wanted, most))
        settled = replace(self, **numbers)
        rule = settled.racing(n_tasks)
        derived: dict[str, Any] = {"racing_first": rule.first, "racing_fraction": rule.fraction}
        begun = kept.get("search") if isinstance(kept, Mapping) else None
        if isinstance(begun, Mapping):
            derived |= {name: begun[name] for name in derived if isinstance(begun.get(name), int | float)}
        return replace(settled, **{name: value for name, value in derived.items() if getattr(self, name) is None})

    def started(self, start: Start, where: str = "--start") -> Curve | Factors:
        """Return a curve or factors to begin with; ``where`` they come from, for messages.

        Raises `LropeError`: no candidate of this search could be that.
        """
        low, high = self.bounds
        if isinstance(start[0], tuple):
            degree = len(start) - 1
            if degree != self.degree and self.parametrization == "bezier":
                raise LropeError(f"{where}: a curve of degree {degree}; give --set degree={degree}")
            try:
                return Curve(start, bounds=self.bounds)
            except LropeError as error:
                raise LropeError(f"{where}: outside the bounds {low:g},{high:g} ({error}); give wider ones") from None
        if self.parametrization == "bezier":
            raise LropeError(
                f"{where}: has factors of layers but no curve, and parametrization bezier searches curves alone; "
                "give a curve, or --set parametrization=both"
            )
        rows = rows_of(start)
        if rows and self.scale == SCALES[0]:
            raise LropeError(
                f"{where}: has numbers of heads, and this search scales layers alone; give --set scale=queries, heads "
                "or both"
            )
        positions = tuned(start, {name: of_heads for name, of_heads in rows.items() if name == "head_factors"})
        outside = [factor for factor in numbers_of(positions) if not low <= factor <= high]
        if outside:
            raise LropeError(
                f"{where}: outside the bounds {low:g},{high:g} (a factor of {outside[0]:g}); give wider ones"
            )
        return start

    def identity(self) -> dict[str, Any]:
        """Return what a study is bound to, as ``config.json`` holds it.

        Without ``max_evaluations`` and ``max_hours``, which only say how far to go: a study may be continued with more
        of either. Without ``guard_text``, of which the study notes the content. A genetic search, of layers, is what a
        study was before there was a choice.
        """
        bound = self.to_json()
        unbound = ["max_evaluations", "max_hours", "guard_text"]
        unbound += [] if self.ascends else ["method", "gradient_steps"]
        for name in ("gradient_starts", "gradient_visits"):
            unbound += [name] if getattr(self, name) == 1 or not self.ascends else []
        unbound += ["scale"] if self.scale == SCALES[0] else []
        return {name: value for name, value in bound.items() if name not in unbound}

    def to_json(self) -> dict[str, Any]:
        """Return all fields as a JSON object, those of the optimizer among them.

        ``start`` and ``guard_text`` only if there are any. Studies have always held lag, population and parents,
        whatever the optimizer.
        """
        values = {"lag": LAG, "population": None, "parents": None} | super().to_json()
        values["start"] = [
            {"factors": start, **rows_of(start)} if isinstance(start, Tuned) else start for start in self.start
        ]
        values |= self.optimizer.to_json() | {"algorithm": self.optimizer.name}
        return {key: value for key, value in values.items() if value or key not in ("start", "guard_text")}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> SearchConfig:
        """Return what `to_json` wrote, or, with defaults for what it leaves out, `identity`.

        Raises `LropeError`: an unknown field, or a value out of range.
        """
        kind = OPTIMIZERS[str(value.get("algorithm", "ga"))]
        own = [one.name for one in kind.settings()]
        others = [name for name in ("lag", "population", "parents") if name not in own]
        shared = {name: item for name, item in value.items() if name not in (*own, *others, "algorithm")}
        chosen = kind(**{name: item for name, item in value.items() if name in own})
        start = [read_factors(one) if isinstance(one, Mapping) else one for one in shared.pop("start", ())]
        return super().from_json({"method": "genetic"} | shared | {"algorithm": chosen, "start": start})

    def of_layers(self) -> SearchConfig:
        """Return these settings for a genetic search, which knows factors of layers alone."""
        start = tuple(tuned(one, {}) if isinstance(one, Tuned) else one for one in self.start)
        return replace(self, method="genetic", scale=SCALES[0], start=start)
