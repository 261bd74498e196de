"""The replay of llama.cpp's graph: what it computes, and its derivatives against llama.cpp's own differences."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch")

from support.arch_models import FIXTURES, LeanModel  # noqa: E402
from support.replayed import NO_REPLAY, FixtureWeights, capture, decoders, made, replayed  # noqa: E402

from lrope_gguf.errors import LropeError  # noqa: E402
from lrope_search import ModelConfig, task_config  # noqa: E402
from lrope_search.evaluation.divergence import GuardTexts  # noqa: E402
from lrope_search.evaluation.encoding import Encoding  # noqa: E402
from lrope_search.evaluation.evaluator import TeacherForcedEvaluator  # noqa: E402
from lrope_search.evaluation.make import open_model, task_for  # noqa: E402
from lrope_search.evaluation.model import Model  # noqa: E402
from lrope_search.evaluation.tuning import Tuner  # noqa: E402
from lrope_search.gradient.ascent import AscentConfig  # noqa: E402
from lrope_search.gradient.capture import Graph, UnsupportedGraphError  # noqa: E402
from lrope_search.gradient.climb import Climb, Step, Text, conflicts, guarded, open_objective  # noqa: E402
from lrope_search.gradient.objective import Objective, ReplayDisagreesError, check_agrees  # noqa: E402
from lrope_search.gradient.replay import Replay, Variables, answers  # noqa: E402
from lrope_search.gradient.rotation import Coherence  # noqa: E402
from lrope_search.gradient.variables import Heads, logarithms  # noqa: E402
from lrope_search.gradient.weights import Weights  # noqa: E402
from lrope_search.scores import Tuned, rows_of  # noqa: E402

pytestmark = [pytest.mark.native, pytest.mark.gradient]
EMBEDDED = Path(__file__).parent.parent / "models" / "lrope-kv.gguf"
EXACT = Coherence(None)
N = 200


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    f32 = {"cache_type_k": "f32", "cache_type_v": "f32"}
    with Model(EMBEDDED, n_gpu_layers=0, n_threads=1, chat=False, flash_attention=False, llama_options=f32) as model:
        model.reserve(256)
        yield model


@pytest.fixture(scope="module")
def weights() -> Weights:
    return Weights(EMBEDDED, dtype=torch.float64)


def tokens() -> NDArray[np.int32]:
    return np.random.default_rng(5).integers(5, 600, N).astype(np.int32)


def logits(model: Model, factors: Sequence[float], tune: Tuner | None = None) -> NDArray[np.float32]:
    part = tokens(), np.arange(N), np.zeros(N, np.int64), np.ones(N, np.bool_)
    model.clear()
    (tune or Model.set_factors)(model, factors)
    return np.concatenate([rows.logits.copy() for rows in model.decode(*part)])


def loss(values: Any) -> Any:
    """The mean log-probability of each next token."""
    return answers(values[:-1], torch.from_numpy(tokens()[1:]).long()).log_p.mean()


def graph_of(model: Model, *, flash: bool = True) -> Graph:
    from lrope_search.gradient.capture import Capture

    part = tokens(), np.arange(N), np.zeros(N, np.int64), np.ones(N, np.bool_), np.ones(N, np.int64)
    with Capture(model.handle, n_tokens=256, flash=flash) as graphs:
        return graphs(part)


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("remat", [True, False])
def test_the_embedded_model_is_replayed(model: Model, weights: Weights, flash: bool, remat: bool) -> None:
    graph = graph_of(model, flash=flash)
    assert ("FLASH_ATTN_EXT" in graph.operations()) == flash
    variables = Variables.zeros(graph, dtype=torch.float64)
    factors = [1.1, 0.9, 1.3, 1.0]
    with torch.no_grad():
        variables.factors.copy_(torch.tensor(factors).double().log()[:, None].expand_as(variables.factors))
    wanted = logits(model, factors)
    got = Replay(graph, weights, remat=remat)(variables).detach().numpy()
    # its weights are float16, to which llama.cpp rounds what it multiplies with them
    assert np.abs(got - wanted).max() < 0.02 * wanted.std()
    assert np.abs(got - logits(model, [1.0] * 4)).max() > 0.2 * wanted.std()


def test_a_layers_factor_does_what_it_does_in_llama_cpp(model: Model, weights: Weights) -> None:
    """The likelihood of a text rises and falls alike when each layer's factor is raised and lowered."""
    graph = graph_of(model)
    replay = Replay(graph, weights)

    def ours(factors: NDArray[np.float64]) -> float:
        variables = Variables.zeros(graph, dtype=torch.float64)
        with torch.no_grad():
            variables.factors.copy_(torch.from_numpy(np.log(factors))[:, None].expand_as(variables.factors))
            return float(loss(replay(variables)))

    def theirs(factors: NDArray[np.float64]) -> float:
        return float(loss(torch.from_numpy(logits(model, factors.tolist())).double()))

    changes = []
    for layer in range(model.n_layer):
        sides = [np.where(np.arange(model.n_layer) == layer, factor, 1.0) for factor in (1.1, 0.9)]
        changes.append([side(sides[0]) - side(sides[1]) for side in (ours, theirs)])
    assert np.abs(changes).max() > 0.1
    assert [a for a, _ in changes] == pytest.approx([b for _, b in changes], abs=0.005)


class ScaledColumns:
    """Weights whose ``attn_output`` takes each head's output times a number."""

    def __init__(self, weights: Weights, scales: NDArray[np.float64]) -> None:
        self._weights, self._scales = weights, torch.from_numpy(scales)
        self.dtype, self.device, self.activation_block = weights.dtype, weights.device, weights.activation_block

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def __getitem__(self, name: str) -> Any:
        value = self._weights[name]
        if not name.endswith("attn_output.weight"):
            return value
        of_layer = self._scales[int(name.split(".")[1])]
        return value * of_layer.repeat_interleave(value.shape[-1] // len(of_layer))


def test_a_heads_output_is_scaled_as_the_columns_that_take_it(model: Model, weights: Weights) -> None:
    graph, rng = graph_of(model), np.random.default_rng(7)
    variables = Variables.zeros(graph, dtype=torch.float64)
    scales = rng.normal(0.0, 0.2, tuple(variables.scales.shape))
    plain = Replay(graph, weights)(variables).detach()
    wanted = Replay(graph, ScaledColumns(weights, np.exp(scales)))(variables).detach()
    with torch.no_grad():
        variables.scales.copy_(torch.from_numpy(scales))
    got = Replay(graph, weights, scaled="outputs")(variables).detach()
    assert (got - wanted).abs().max() < 1e-9 * (wanted - plain).abs().max()


def test_heads_do_what_they_do_in_llama_cpp(model: Model, weights: Weights) -> None:
    graph, rng = graph_of(model), np.random.default_rng(7)
    rows = [
        tuple(tuple(np.exp(rng.normal(0.0, 0.2, n)).tolist()) for n in counts)
        for counts in (model.n_head_kv, model.n_head)
    ]
    one, tune = (1.0,) * model.n_layer, Tuner(model.path)
    plain = logits(model, one, tune)
    for tuned in (Tuned(one, rows[0]), Tuned(one, None, rows[1]), Tuned(one, *rows)):
        heads = Heads(*Replay(graph, weights).heads[:2], model.n_head_kv, model.n_head)
        variables = Variables.zeros(graph, dtype=torch.float64)
        with torch.no_grad():
            for tensor, values in zip((variables.factors, variables.scales), logarithms(tuned, heads), strict=True):
                tensor.copy_(torch.from_numpy(values).expand_as(tensor))
        wanted = logits(model, tuned, tune)
        got = Replay(graph, weights)(variables).detach().numpy()
        assert np.abs(got - wanted).max() < 0.02 * wanted.std() < 0.1 * np.abs(plain - wanted).max()
    assert (logits(model, one, tune) == plain).all()


@pytest.mark.parametrize("flash", [True, False])
def test_derivatives_by_heads_are_finite_differences(model: Model, weights: Weights, flash: bool) -> None:
    graph = graph_of(model, flash=flash)
    replay = Replay(graph, weights, coherence=EXACT)
    rng = np.random.default_rng(1)
    start = Variables.zeros(graph, dtype=torch.float64)
    with torch.no_grad():
        for tensor in (start.factors, start.scales):
            tensor.copy_(torch.from_numpy(rng.normal(0.0, 0.1, tensor.shape)))
    loss(replay(start)).backward()
    names = ("factors", "scales") if flash else ("factors",)
    for name in names:
        tensor = getattr(start, name)
        direction = torch.from_numpy(rng.normal(size=tensor.shape))
        step, sides = 1e-5, []
        with torch.no_grad():
            for sign in (1, -1):
                moved = {n: getattr(start, n) + (sign * step * direction if n == name else 0.0) for n in vars(start)}
                sides.append(float(loss(replay(Variables(**moved)))))
        assert float((tensor.grad * direction).sum()) == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-4)


@pytest.mark.parametrize("name", decoders())
def test_every_architecture_is_replayed_or_says_what_is_missing(name: str, tmp_path: Path) -> None:
    result = replayed(FIXTURES[name], tmp_path)
    missing = NO_REPLAY.get(name)
    if missing is None:
        assert result.verdict == "equal"
        assert result.by_factors or len(FIXTURES[name].without) == FIXTURES[name].n_layer
    else:
        assert missing in result.error


# fused and partial tensors, writes into part of a memory, experts, sinks, windows, YaRN, M-RoPE, shared caches
FINITE = ("phi3", "chameleon", "gpt-oss", "deepseek2", "gemma3-yarn", "qwen3vl", "gemma4", "plm")


@pytest.mark.parametrize("name", FINITE)
def test_derivatives_of_architectures_are_finite_differences(name: str, tmp_path: Path) -> None:
    with made(FIXTURES[name], tmp_path) as fixture:
        graph = capture(fixture.handle, flash=name != "plm")
        replay = Replay(graph, FixtureWeights(fixture), coherence=EXACT)
        variables = Variables.zeros(graph, dtype=torch.float64)
        rng = np.random.default_rng(2)
        by_heads = [torch.from_numpy(rng.normal(size=v.shape)) for v in (variables.factors, variables.scales)]
        weight = torch.from_numpy(np.random.default_rng(3).normal(size=graph.output.shape[2:]))

        def weighted(at: Variables) -> Any:
            values = replay(at)
            return (weight * values)[values.abs() < 1e30].sum()

        weighted(variables).backward()
        step = 1e-5
        for which, moved in enumerate((variables.factors, variables.scales)):
            if moved.grad is None:
                assert which and not replay.heads.queries  # attention is several operations
                continue
            at = [variables.factors.detach(), variables.scales.detach()]
            sides = []
            with torch.no_grad():
                for sign in (step, -step):
                    at[which] = moved + sign * by_heads[which]
                    sides.append(float(weighted(Variables(*at))))
            slope = float((moved.grad * by_heads[which]).sum())
            assert slope == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-3)
            assert slope


class Folded:
    """Weights whose queries come scaled out of their product: rows of ``attn_q`` and its bias."""

    def __init__(self, weights: FixtureWeights, log_scales: NDArray[np.float64]) -> None:
        self._weights, self._scales = weights, torch.from_numpy(np.exp(log_scales))
        self.dtype, self.device, self.activation_block = weights.dtype, weights.device, weights.activation_block

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def __getitem__(self, name: str) -> Any:
        value = self._weights[name]
        found = re.fullmatch(r"blk\.(\d+)\.attn_q\.(weight|bias)", name)
        if found is None:
            return value
        axis = 2 if found[2] == "weight" else 3
        scales = self._scales[int(found[1])].repeat_interleave(value.shape[axis] // self._scales.shape[1])
        return value * (scales[:, None] if axis == 2 else scales)


# a plain one, soft caps (whose queries must be large), and biases with sinks and windows
@pytest.mark.parametrize(("name", "size"), [("llama", 10.0), ("gemma2", 1e3), ("gpt-oss", 10.0)])
def test_query_scales_are_those_of_rows_of_the_projection(name: str, size: float, tmp_path: Path) -> None:
    with made(FIXTURES[name], tmp_path) as fixture:
        graph, weights = capture(fixture.handle), FixtureWeights(fixture)
        variables = Variables.zeros(graph, dtype=torch.float64)
        scales = np.random.default_rng(4).normal(0.0, 0.4, variables.scales.shape)
        zeros = Variables.zeros(graph, dtype=torch.float64)
        with torch.no_grad():
            variables.scales.copy_(torch.from_numpy(scales))
            large = np.full(scales.shape, math.log(size))
            wanted = Replay(graph, Folded(weights, large + scales))(zeros)
            got, plain = (Replay(graph, Folded(weights, large))(at) for at in (variables, zeros))
        usual = wanted.abs() < 1e30
        assert (got - wanted)[usual].abs().max() < 1e-6 * (plain - wanted)[usual].abs().max()


def test_an_unknown_operation_is_named(tmp_path: Path) -> None:
    with LeanModel(FIXTURES["qwen35"], tmp_path) as fixture:
        graph = capture(fixture.handle)
        with pytest.raises(
            UnsupportedGraphError, match="operation GATED_DELTA_NET, of which no derivative is known here"
        ):
            Replay(graph, FixtureWeights(fixture))


@pytest.fixture(scope="module")
def asked() -> Iterator[tuple[TeacherForcedEvaluator, Model]]:
    config = task_config("kv", keys=80, probes=6, identifiers="word", seed=3)
    with open_model(ModelConfig(str(EMBEDDED), n_threads=1, n_gpu_layers=0)) as model:
        yield TeacherForcedEvaluator(model, task_for(model, config)), model


def test_answers_agree_with_the_evaluator(asked: tuple[TeacherForcedEvaluator, Model]) -> None:
    evaluator, model = asked
    reference = evaluator.evaluate((1.0,) * model.n_layer, "search", 0)
    encoding = evaluator.encoding("search", 0)
    weights = Weights(EMBEDDED)
    with Objective(model, weights) as objective:
        zeros = np.zeros((model.n_layer, 1))
        got = objective.answers(encoding, zeros)
        check_agrees(got.probes, reference)
        assert got.value == pytest.approx(reference.log_probability, abs=0.02)
        assert objective.answers(encoding, zeros, differentiate=False).value == pytest.approx(got.value, abs=1e-6)
        moved = objective.answers(encoding, zeros + 0.5)
        with pytest.raises(ReplayDisagreesError, match=r"nats off llama\.cpp"):
            check_agrees(moved.probes, reference)
        same = objective.divergence(encoding.prefix, zeros)
        assert same.value == pytest.approx(0.0, abs=1e-6)
        far = objective.divergence(encoding.prefix, zeros + 0.3)
        assert far.value > 0.01
        step = np.eye(model.n_layer)[:, :1] * 0.001
        sides = [objective.divergence(encoding.prefix, zeros + 0.3 + sign * step).value for sign in (1, -1)]
        assert np.isfinite(far.factors).all()
        assert sides[0] != sides[1]


def test_what_does_not_fit_is_said_before_it_is_loaded(
    asked: tuple[TeacherForcedEvaluator, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator, model = asked
    weights, where = Weights(EMBEDDED), "lrope_search.gradient.objective.free_memory"
    monkeypatch.setattr(where, lambda: weights.n_bytes - 1)
    with pytest.raises(LropeError, match=r"lrope-kv\.gguf: gradients need 0\.0 GB more, 0\.0 GB are free"):
        Objective(model, weights)
    monkeypatch.setattr(where, lambda: weights.n_bytes)
    encoding = evaluator.encoding("search", 0)
    with Objective(model, weights) as objective, pytest.raises(LropeError, match="ask for shorter contexts"):
        objective.answers(encoding, np.zeros((model.n_layer, 1)))


def climb_of(
    asked: tuple[TeacherForcedEvaluator, Model],
    objective: Objective,
    encode: Callable[[int], Encoding] | None = None,
    **options: Any,
) -> Climb:
    evaluator, _ = asked
    text = evaluator.encoding("validation", 0).prefix[:64]
    of_climb = {name: options.pop(name) for name in ("starts", "seed", "middle_weight", "scale") if name in options}
    given = {"steps": 6, "max_divergence": 1.0, **options}
    return Climb(
        objective, [encode or (lambda k: evaluator.encoding("search", k))], names=["kv"], weights=[2.0], scales=[0.5],
        texts=[Text(text)], layers=[0, 1, 3], config=AscentConfig(**given), **of_climb,
    )  # fmt: skip


def test_a_climb_gains_and_goes_on_where_it_was_killed(asked: tuple[TeacherForcedEvaluator, Model]) -> None:
    evaluator, model = asked
    with Objective(model, Weights(EMBEDDED)) as objective:
        climb = climb_of(asked, objective)
        steps = []
        while not climb.done:
            steps.append(Step.from_json(json.loads(json.dumps(climb.step().to_json()))))
        assert [step.number for step in steps] == [1, 2, 3, 4, 5, 6]
        assert steps[0].divergence == 0.0 < steps[-1].divergence
        assert steps[1].n_tokens == 3 * (evaluator.n_tokens("search", 2) + 64) + 64
        assert steps[2].n_tokens == 3 * (evaluator.n_tokens("search", 3) + 64)
        again = climb_of(asked, objective)
        again.restore(steps[3].state)
        while not again.done:
            again.step()
    assert again.factors == climb.factors
    assert climb.factors[2] == 1.0
    one = (1.0,) * model.n_layer
    gain = [
        evaluator.evaluate(climb.factors, "test", i).log_probability
        - evaluator.evaluate(one, "test", i).log_probability
        for i in range(4)
    ]
    assert np.mean(gain) > 0.3


def test_a_climb_from_several_places_goes_on_where_it_was_killed(
    asked: tuple[TeacherForcedEvaluator, Model],
) -> None:
    given = {"starts": (None, None, (1.0, 1.2, 1.0, 0.9)), "steps": 2, "seed": 7}
    with Objective(asked[1], Weights(EMBEDDED)) as objective:
        climb = climb_of(asked, objective, **given)
        steps = []
        while not climb.done:
            steps.append(Step.from_json(json.loads(json.dumps(climb.step().to_json()))))
        assert [step.number for step in steps] == [1, 2, 3, 4, 5, 6]
        begun = np.array([steps[i].log_factors for i in (0, 2, 4)])
        assert not begun[0].any() and begun[1][2] == 0.0
        assert 0.01 < np.abs(begun[1][[0, 1, 3]]).max() < 0.5
        assert begun[2] == pytest.approx(np.log([1.0, 1.2, 1.0, 0.9]))
        for kept in (1, 2, 3, 4):
            again = climb_of(asked, objective, **given)
            again.restore(steps[kept - 1].state)
            while not again.done:
                last = again.step()
            assert again.factors == climb.factors
            assert last.log_factors == steps[-1].log_factors
        other = climb_of(asked, objective, **{**given, "seed": 8})
        other.restore(steps[1].state)
        assert other.step().log_factors != steps[2].log_factors
        with pytest.raises(LropeError, match="is of start 3, of 3"):
            climb.restore(steps[-1].state | {"start": 3})


def test_the_middle_of_a_context_counts_more(asked: tuple[TeacherForcedEvaluator, Model]) -> None:
    evaluator, model = asked
    encoding = evaluator.encoding("search", 1)
    weights = 1.0 + 3.0 * 4.0 * np.array(encoding.depths) * (1.0 - np.array(encoding.depths))
    at = np.zeros((model.n_layer, 1))
    with Objective(model, Weights(EMBEDDED)) as objective:
        even = objective.answers(encoding, at)
        middle = objective.answers(encoding, at, middle_weight=3.0)
        each = np.array([probe.log_probability for probe in even.probes])
        assert middle.value == pytest.approx(float(weights @ each / weights.sum()), rel=1e-5)
        assert middle.value != pytest.approx(even.value, rel=1e-4)
        assert np.abs(middle.factors - even.factors).max() > 1e-4
        by_search = climb_of(asked, objective, middle_weight=3.0)
        assert by_search.step().gains["kv"] == pytest.approx(
            objective.answers(evaluator.encoding("search", 1), at, middle_weight=3.0).value, rel=1e-6
        )


def test_a_climb_holds_its_limit_and_says_what_is_at_a_bound(asked: tuple[TeacherForcedEvaluator, Model]) -> None:
    with Objective(asked[1], Weights(EMBEDDED)) as objective:
        far, near = (climb_of(asked, objective, max_divergence=limit) for limit in (10.0, 0.005))
        last = []
        for climb in (far, near):
            while not climb.done:
                step = climb.step()
            last.append(step)
        assert last[1].divergence < 0.01 < last[0].divergence
        assert last[0].price == 0.0 < last[1].price
        bounded = climb_of(asked, objective, low=-0.01, high=0.01, steps=2)
        bounded.step()
        assert set(bounded.at_bound) <= {0, 1, 3}
        assert bounded.at_bound
        scales = climb_of(asked, objective, scale="queries", query_bound=0.001, steps=2)
        scales.step()
        assert max(value for row in rows_of(scales.factors)["query_scales"] for value in row) == 1.001
        assert scales.at_bound == ()  # the bounds that a search can be given are not those of scales


def test_steps_that_share_a_context_ask_for_it_again(asked: tuple[TeacherForcedEvaluator, Model]) -> None:
    seen: list[int] = []

    def encode(number: int) -> Encoding:
        seen.append(number)
        return asked[0].encoding("search", number)

    with Objective(asked[1], Weights(EMBEDDED)) as objective:
        climb = climb_of(asked, objective, encode, steps=3, visits=2, starts=(None, None))
        steps = [climb.step() for _ in range(6)]
        assert seen == [1, 1, 2, 3, 3, 4]
        again = climb_of(asked, objective, encode, steps=3, visits=2, starts=(None, None))
        again.restore(json.loads(json.dumps(steps[3].state)))
        assert [again.step().state for _ in range(2)] == [step.state for step in steps[4:]]


def test_what_torch_cannot_compute_moves_nothing(
    asked: tuple[TeacherForcedEvaluator, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = Weights(EMBEDDED)
    with Objective(asked[1], weights) as objective:
        climb = climb_of(asked, objective)
        one = climb.factors

        def fails(*_: object, **__: object) -> None:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] not enough memory\nframe 0")

        with monkeypatch.context() as patch, pytest.raises(LropeError, match=r"step 1 .* not enough memory$"):
            patch.setattr(Objective, "answers", fails)
            climb.step()
        weights["output_norm.weight"][0, 0, 0, 0] = math.nan
        with pytest.raises(LropeError, match="step 1 of the gradient ascent: a derivative is not a number"):
            climb.step()
        assert climb.factors == one


def test_steps_look_at_the_long_text_after_every_two_short_ones(asked: tuple[TeacherForcedEvaluator, Model]) -> None:
    texts = GuardTexts(tuple(tuple(range(i, i + 8)) for i in range(4)), tuple(range(3000)))
    turn = guarded(texts)
    assert [text.kind for text in turn] == [0, 0, 1, 0, 0, 1]
    assert turn[2] is turn[5] and (turn[2].first, len(turn[2].tokens)) == (8, 1024)
    assert [text.tokens[0] for text in turn] == [0, 1, 0, 2, 3, 0] and not any(text.first for text in turn[:2])
    assert [text.kind for text in guarded(GuardTexts(texts.short, texts.long[:8]))] == [0] * 4
    evaluator, model = asked
    with Objective(model, Weights(EMBEDDED)) as objective:
        climb = climb_of(asked, objective, steps=7)
        long = evaluator.encoding("validation", 1).prefix[:96]
        short = [Text(evaluator.encoding("validation", i).prefix[:48]) for i in (0, 1)]
        climb._texts = (*short, Text(long, 1, 48))
        steps = [climb.step() for _ in range(7)]
        for number, n_text in ((2, 4 * 96), (3, 4 * 48), (4, 4 * 48), (5, 3 * 96), (6, 3 * 48)):
            assert steps[number - 1].n_tokens == 3 * evaluator.n_tokens("search", number) + n_text
        at = np.full((model.n_layer, 1), 0.1)
        whole, end = (objective.divergence(long, at, differentiate=False, first=first) for first in (0, 48))
        begin = objective.divergence(long[:48], at, differentiate=False)
        assert whole.value == pytest.approx((begin.value + end.value) / 2, rel=1e-4)


def test_conflicts_are_cosines() -> None:
    got = conflicts({"a": np.array([1.0, 0.0]), "b": np.array([-3.0, 3.0]), "c": np.zeros(2)})
    half = -math.sqrt(0.5)
    assert got == pytest.approx(np.array([[1.0, half, 0.0], [half, 1.0, 0.0], [0.0, 0.0, 0.0]]))


def test_a_model_is_opened_for_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(str(EMBEDDED), n_threads=1)
    with open_objective(config, device="cpu") as objective:
        assert objective.n_layer == 4
    monkeypatch.setattr("lrope_search.gradient.climb.free_memory", lambda: 1_000_000)
    said = r"^\S+lrope-kv\.gguf: gradients need 0\.\d GB .* a file of 0\.0 GB would fit$"
    with pytest.raises(LropeError, match=said), open_objective(config, device="cpu"):
        pass


@pytest.mark.parametrize("name", ["torch", "gguf"])
@pytest.mark.parametrize("found", [None, "0.1.2"])
def test_a_package_that_is_missing_or_old_is_named(
    name: str, found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if found is None:
        monkeypatch.setitem(sys.modules, name, None)
    else:
        monkeypatch.setattr("lrope_search.gradient.climb.version", lambda n: found if n == name else "9.9")
    said = rf"^gradients need {name} .*pip install 'lrope-gguf\[gradient\]'$"
    with pytest.raises(LropeError, match=said), open_objective(ModelConfig(str(EMBEDDED))):
        pass


def test_a_model_without_rope_is_refused(tmp_path: Path) -> None:
    with LeanModel(FIXTURES["gpt2"], tmp_path) as fixture, pytest.raises(LropeError, match="this model has no RoPE"):
        capture(fixture.handle)
