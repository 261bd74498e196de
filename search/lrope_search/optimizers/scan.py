"""The scan that finds the few layers that matter: a stage of its own, which any optimizer can follow."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from ..scores import LAYER_SCAN
from .layers import Group, LayerSpace
from .protocol import Candidate, Optimizer, Score, rank
from .settings import LAG
from .space import Ledger, Start

_RAISED, _LOWERED = 3.6, -2.0  # log factors of the scan, in units of `width`: 1.2 and 0.9 by default
_TOGETHER = 4  # layers that gained alone are tried together, two to so many of them


class LayerScan:
    """Finds the layers that matter: each, or each group of a deep model, is raised alone; then those with an effect.

    First every group is raised. The half that moved the fitness most is lowered as well. Where groups hold several
    layers, the layers of the quarter that moved most are then looked at one by one in the same way (adaptive group
    testing). What is asked depends on results alone.
    """

    _MOST = 32  # groups at first

    def __init__(self, n_layers: int, raised: float, lowered: float) -> None:
        """Plan for ``n_layers`` layers: log factors ``raised`` and ``lowered``."""
        self._directions = (raised, lowered)
        n_groups = min(n_layers, self._MOST)
        self._groups: list[Group] = [tuple(part.tolist()) for part in np.array_split(np.arange(n_layers), n_groups)]
        self._waiting: deque[tuple[Group, float]] = deque((group, raised) for group in self._groups)
        self._out = 0
        self._lowering = False
        self.effects: dict[tuple[Group, float], float] = {}
        """Fitness of each group and log factor that was tried."""
        self.done = False

    @property
    def raised(self) -> bool:
        """Whether all groups of this stage were raised, and lowering begins."""
        return self._lowering

    def leave_lowering(self) -> None:
        """Lower nothing, and end, if each layer was raised by itself; groups must still be split."""
        if self._lowering and all(len(group) == 1 for group in self._groups):
            self._waiting.clear()
            self.done = not self._out

    def next(self) -> tuple[Group, float] | None:
        """Return what to try next; None if results must come first, or at the end."""
        if not self._waiting:
            return None
        self._out += 1
        return self._waiting.popleft()

    def tell(self, group: Group, log_factor: float, fitness: float) -> None:
        """Take a result; when a stage is complete, plan the next one."""
        self.effects[group, log_factor] = fitness
        self._out -= 1
        if self._waiting or self._out:
            return
        raised, lowered = self._directions
        if not self._lowering:
            self._lowering = True
            half = self._most_moved(self._groups)[: (len(self._groups) + 1) // 2]
            self._waiting.extend((group, lowered) for group in sorted(half))
            return
        several = [group for group in self._most_moved(self._groups) if len(group) > 1]
        self._groups = [(i,) for group in several[: (len(several) + 3) // 4] for i in group]
        self._lowering = False
        self._waiting.extend((group, raised) for group in sorted(self._groups))
        self.done = not self._waiting

    def relevant(self, most: int) -> list[int]:
        """Return up to ``most`` layers by how much they moved the fitness alone, either way; the most first."""
        return [group[0] for group in self._most_moved([g for g in self._tried() if len(g) == 1])[:most]]

    def gains(self) -> list[tuple[int, float]]:
        """Return layers that gained alone, each with its better log factor, the best first."""
        best: dict[int, tuple[float, float]] = {}
        for (group, log_factor), fitness in self.effects.items():
            if len(group) == 1 and fitness > max(0.0, best.get(group[0], (0.0, 0.0))[1]):
                best[group[0]] = (log_factor, fitness)
        order = sorted(best, key=lambda layer: (-best[layer][1], layer))
        return [(layer, best[layer][0]) for layer in order]

    def _tried(self) -> list[Group]:
        return list(dict.fromkeys(group for group, _ in self.effects))

    def _most_moved(self, groups: Sequence[Group]) -> list[Group]:
        def moved(group: Group) -> float:
            # what llama.cpp refuses says nothing of the layer
            found = [self.effects.get((group, direction), 0.0) for direction in self._directions]
            return max(abs(value) if math.isfinite(value) else 0.0 for value in found)

        return sorted(groups, key=lambda group: (-moved(group), group))


class ScanStage:
    """The first stage of a search over layers: what is known to be good, then the scan; asks and is told.

    Layers that gain alone are tried together, when all were raised and when the scan is over. Where the largest uniform
    factor is the best so far, its square is tried too. Where a curve leads when all layers were raised, none is
    lowered: no layer carries what a curve does.

    Layers are raised by 3.6 times ``width``, a log factor, and lowered by 2 times; at most ``own_layers`` of them count
    as relevant. ``ledger``, of the whole search, issues the candidates.
    """

    def __init__(
        self, space: LayerSpace, start: Sequence[Start], ledger: Ledger, *, width: float, own_layers: int = 8
    ) -> None:
        self._space, self._ledger, self._own_layers = space, ledger, own_layers
        self._queue = deque(start)
        self._scan = LayerScan(len(space.layers), _RAISED * width, _LOWERED * width)
        self._asked: dict[int, tuple[Group, float]] = {}  # what the scan waits for, by candidate id
        self._best: tuple[Candidate, Score] | None = None
        self.relevant: list[int] | None = None
        """The layers that moved most, as indices into those of the space, the most first; None until that is known."""

    @property
    def done(self) -> bool:
        """Whether there is nothing more to ask for, though something may be still to be told."""
        return self.relevant is not None and not self._queue

    def ask(self) -> Candidate | None:
        """Return the next candidate; None if results must come first, or at the end (`done`)."""
        while True:
            if self._queue:
                candidate = self._ledger.issue(*self._queue.popleft())
            elif self._scan.done or (asked := self._scan.next()) is None:
                return None
            elif candidate := self._ledger.issue(self._space.moved(*asked), LAYER_SCAN):
                self._asked[candidate.id] = asked
            else:
                self._scan.tell(*asked, 0.0)  # as good as known; the bounds may leave nothing to move
                if self._scan.done:
                    self._end()
            if candidate is not None:
                return candidate

    def tell(self, candidate: Candidate, score: Score) -> None:
        """Take the score of a candidate, in the order of their ids."""
        if self._best is None or rank((candidate, score)) < rank(self._best):
            self._best = (candidate, score)
            if candidate.origin == "uniform":
                self._reach_further(candidate)
        if candidate.id not in self._asked:
            return
        raised = self._scan.raised
        self._scan.tell(*self._asked.pop(candidate.id), score[1])
        if self._scan.raised and not raised:
            self._try_together()  # what gained so far need not wait for the layers to lower
            if self._best[0].curve is not None:
                self._scan.leave_lowering()  # what follows will do more
        if self._scan.done:
            self._end()

    def _end(self) -> None:
        self.relevant = self._scan.relevant(self._own_layers)
        self._try_together()

    def _reach_further(self, candidate: Candidate) -> None:
        """Where the largest uniform factor is the best so far, try its square: the optimum may lie far away."""
        uniform = [genome[0] for genome, origin in self._queue if origin == "uniform"]
        uniform += [self._ledger.genomes[other.id][0] for other in self._ledger.pending if other.origin == "uniform"]
        reached = float(self._ledger.genomes[candidate.id][0])
        if reached > max([0.0, *uniform]):
            self._queue.appendleft((self._space.repair(self._space.uniform(math.exp(2.0 * reached))), "uniform"))

    def _try_together(self) -> None:
        """Try the layers that gained together, the best two to `_TOGETHER` of them."""
        relevant = self._scan.relevant(self._own_layers)
        gains = [(i, log_factor) for i, log_factor in self._scan.gains() if i in relevant]
        for n in range(2, min(len(gains), _TOGETHER) + 1):
            genome = self._space.uniform(1.0)
            for i, log_factor in gains[:n]:
                genome[self._space.n_curve + i] = log_factor
            self._queue.append((self._space.repair(genome), "together"))


Follower: TypeAlias = Callable[[LayerSpace, Sequence[Start]], Optimizer]
"""Makes an optimizer of the space that a scan has left, and of what it should begin with."""


class ScanFirst:
    """The scan, and then any optimizer over the layers that were found to matter.

    ``follow`` makes the optimizer that goes on. It begins with the ``n_best`` best candidates of the scan; what it asks
    for again gets the score that is known. ``lag`` is the scan's own.
    """

    def __init__(
        self,
        space: LayerSpace,
        start: Sequence[Start],
        follow: Follower,
        *,
        lag: int = LAG,
        width: float = 0.05,
        n_best: int = 8,
    ) -> None:
        self._space, self._follow, self._lag, self._n_best = space, follow, lag, n_best
        self._ledger = Ledger(space)
        self._stage = ScanStage(space, start, self._ledger, width=width)
        self._told: list[tuple[Candidate, Score]] = []
        self._next: Optimizer | None = None
        self._asked: dict[int, Candidate] = {}  # the follower's candidates, by our ids
        self._waiting: deque[tuple[Candidate, int | None]] = deque()  # the follower's, with ours; None once it is known

    @property
    def lag(self) -> int:
        """How far asking may run ahead of telling."""
        return self._lag if self._next is None else self._next.lag

    def should_stop(self) -> bool:
        """Whether the optimizer that follows has come to its end."""
        return self._next is not None and self._next.should_stop()

    def ask(self) -> Candidate | None:
        """Return the next candidate; None if more must be told first, or at the end."""
        if len(self._ledger.pending) >= self.lag:
            return None
        if self._next is None:
            candidate = self._stage.ask()
            if candidate is not None or not self._stage.done or self._ledger.pending:
                return candidate
            self._next = self._begin()
        while (theirs := self._next.ask()) is not None:
            genome = self._space.encode(theirs.curve or theirs.factors)
            known = self._ledger.find(genome)
            if known is None:
                candidate = self._ledger.issue(genome, theirs.origin)
                assert candidate is not None
                self._waiting.append((theirs, candidate.id))
                return candidate
            self._waiting.append((theirs, known))
            self._pass_on()
        return None

    def tell(self, candidate: Candidate, score: Score) -> None:
        """Take a score. Raises `ValueError`: it is not the oldest candidate that was asked for and not told."""
        self._ledger.settle(candidate, score)
        self._told.append((candidate, score))
        if self._next is None:
            self._stage.tell(candidate, score)
        else:
            self._pass_on()

    def _pass_on(self) -> None:
        """Tell the follower what is known, in the order of its candidates."""
        assert self._next is not None
        while self._waiting and (known := self._waiting[0][1]) is not None and known < len(self._ledger.scores):
            self._next.tell(self._waiting.popleft()[0], self._ledger.scores[known])

    def _begin(self) -> Optimizer:
        relevant = self._stage.relevant or []
        layers = sorted(self._space.layers[i] for i in relevant) or list(self._space.layers)
        space = LayerSpace(self._space.n_layer, layers, curve=self._space.curve, bounds=self._space.bounds)
        best = [candidate for candidate, _ in sorted(self._told, key=rank)[: self._n_best]]
        return self._follow(space, [(space.encode(one.curve or one.factors), one.origin) for one in best])
