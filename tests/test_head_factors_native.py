"""Position factors of KV heads: rotations, caches and states against the float64 reference, and what is refused."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.arch_models import FIXTURES, GRAPHS, N_VOCAB, Graphs, Session, open_model
from support.dynamic_rope import DynamicReference, Scaling, level_of
from support.graph_nodes import Graph
from support.llama_direct import GGML_TYPE_F16, GGML_TYPE_Q8_0, Context, RopeTrace, errors
from support.rope_angles import check, constant, unit_pairs
from support.rope_models import (
    FACTORS,
    GEMMA3,
    HEAD_FACTORS,
    LLAMA,
    LLAMA3,
    MODELS,
    MROPE,
    MULTI,
    N_HEAD_KV,
    N_LAYER,
    PARTIAL,
    QWEN3,
    SHIFTABLE,
    TOKENS,
    WIDE_64,
    YARN,
    TinyModel,
    by_name,
    expected,
    file_of,
)
from support.rope_reference import TOLERANCE, no_noisier, relative_error, rms_error, text_positions
from support.tiny_models import LLAMA as READABLE
from support.tiny_models import write_readable

from lrope_gguf.errors import LropeError
from lrope_gguf.native import tool_path
from lrope_search.demo.server import LlamaServer
from lrope_search.evaluation.model import Model

pytestmark = pytest.mark.native

ONE_D = [model for model in MODELS if model not in MULTI]
OTHER = HEAD_FACTORS[::-1]
ONES = [[1.0] * N_HEAD_KV] * N_LAYER
FLAT = [factor for row in HEAD_FACTORS for factor in row]
N, MORE = 90, 20
AFTER = TOKENS[N : N + MORE]
WIDE = replace(WIDE_64, name="wide-64-2", config=replace(WIDE_64.config, n_head=4, n_head_kv=2))


@pytest.mark.parametrize("model", ONE_D, ids=by_name)
def test_logits_equal_the_reference(model: TinyModel) -> None:
    want = model.reference(HEAD_FACTORS).decode(TOKENS)
    with Context(file_of(model), model.n_ctx) as context:
        assert context.set_head_factors(HEAD_FACTORS) == 0
        at_once = context.decode(TOKENS)
        context.clear()
        one_by_one = np.concatenate([context.decode([token]) for token in TOKENS[:40]])
    assert relative_error(at_once, want) < TOLERANCE
    assert relative_error(one_by_one, want[:40]) < TOLERANCE
    swapped = [row[::-1] for row in HEAD_FACTORS]
    assert relative_error(model.reference(swapped).decode(TOKENS), want) > 0.1, "which head has which must matter"


@pytest.mark.parametrize("model", ONE_D, ids=by_name)
def test_angles_up_to_position_32000(model: TinyModel, tmp_path: Path) -> None:
    """Queries and keys that are known before they turn; the context is shorter than most of the positions."""
    n, ropes, head_dim = 16, model.config.ropes, model.config.head_dim
    path = model.write(tmp_path / "model.gguf", weights=constant(model, unit_pairs(ropes[0], head_dim)))
    group = model.config.n_head // N_HEAD_KV
    for start in (0, 1000, 8000, 32000 - n):
        traced = RopeTrace()
        with Context(path, model.n_ctx, trace=traced) as context:
            assert context.set_head_factors(HEAD_FACTORS) == 0
            context.decode(TOKENS[:n], start=start)
        assert len(traced.outputs) == 2 * N_LAYER
        # R is a power of two such that no position times R is beyond 2^31
        grain = 0.5 * max(model.n_ctx, start + n) / min(FLAT) / 2**30
        for name, out in traced.outputs.items():
            il = int(re.findall(r"cur\w*-(\d+)", name)[0])
            got = out.reshape(n, -1, head_dim)
            for head in range(got.shape[1]):
                k = head // group if got.shape[1] == model.config.n_head else head
                s = float(np.float32(HEAD_FACTORS[il][k]))
                check(ropes[il], got[:, [head]], text_positions(start, n), s, grain)


@pytest.mark.parametrize("model", [LLAMA, GEMMA3, YARN], ids=by_name)
def test_heads_that_agree_are_a_factor_of_the_layer(model: TinyModel) -> None:
    with Context(file_of(model), model.n_ctx) as context:
        stock = context.decode(TOKENS)
        results = []
        for how in (context.set_factors, lambda factors: context.set_head_factors([[f] * N_HEAD_KV for f in factors])):
            context.clear()
            assert how(FACTORS) == 0
            assert context.get_factors(N_LAYER) == pytest.approx(FACTORS)
            assert context.get_head_factors() == pytest.approx([f for f in FACTORS for _ in range(N_HEAD_KV)])
            results.append(context.decode(TOKENS))
        np.testing.assert_array_equal(*results)
        for off in (ONES, None):
            context.clear()
            assert context.set_head_factors(off) == 0
            np.testing.assert_array_equal(context.decode(TOKENS), stock)


def test_the_last_that_was_set_holds() -> None:
    """The graph of the step before would be reused if nothing forbade it."""
    with Context(file_of(LLAMA, FACTORS)) as context:
        for rows, layers in ((HEAD_FACTORS, None), (OTHER, None), (None, FACTORS[::-1]), (HEAD_FACTORS, None)):
            context.clear()
            assert (context.set_factors(layers) if layers else context.set_head_factors(rows)) == 0
            got = np.concatenate([context.decode([token]) for token in TOKENS[:30]])
            assert relative_error(got, LLAMA.reference(layers or rows).decode(TOKENS[:30])) < TOLERANCE
        assert context.get_head_factors() == pytest.approx(FLAT)
        alike = [row[0] if row[0] == row[1] else 1.0 for row in HEAD_FACTORS]
        assert context.get_factors(N_LAYER) == pytest.approx(alike)
        context.clear()
        assert context.set_head_factors(None) == 0, "those of the file, which has factors of layers"
        assert relative_error(context.decode(TOKENS), expected(LLAMA, FACTORS)) < TOLERANCE


def shifted(model: TinyModel, rows: Any, start: int = 5, stop: int = 37, **parameters: Any) -> tuple[Any, Any]:
    """Logits after a context shift, and those of the reference."""
    reference = model.reference(rows)
    reference.decode(TOKENS[:N])
    reference.remove(start, stop)
    with Context(file_of(model), model.n_ctx, swa_full=True, **parameters) as context:
        assert context.set_head_factors(rows) == 0
        context.decode(TOKENS[:N])
        context.shift(start, stop)
        return context.decode(AFTER), reference.decode(AFTER)


@pytest.mark.parametrize("model", SHIFTABLE, ids=by_name)
def test_context_shift_equals_the_reference(model: TinyModel) -> None:
    got, reference = shifted(model, HEAD_FACTORS)
    assert relative_error(got, reference) < TOLERANCE
    # without the shift, the keys would stand where they stood
    assert relative_error(model.reference(HEAD_FACTORS).decode(TOKENS)[N : N + MORE], reference) > 0.1


def test_keys_shifted_by_more_than_the_context() -> None:
    reference = LLAMA.reference(HEAD_FACTORS)
    reference.decode(TOKENS[:N])
    reference.add(0, None, 20000)
    with Context(file_of(LLAMA)) as context:
        assert context.set_head_factors(HEAD_FACTORS) == 0
        context.decode(TOKENS[:N])
        context.add(0, -1, 20000)
        got = context.decode(AFTER, start=N + 20000)
    assert relative_error(got, reference.decode(AFTER)) < 50 * TOLERANCE  # float32 angles of 20000 and more


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (LLAMA, {"type_kv": GGML_TYPE_F16}), (GEMMA3, {"type_kv": GGML_TYPE_F16, "flash": True}),
        (PARTIAL, {"type_kv": GGML_TYPE_F16}), (YARN, {"type_kv": GGML_TYPE_F16, "flash": True}),
    ],
    ids=lambda case: case.name if isinstance(case, TinyModel) else "",
)  # fmt: skip
def test_a_cache_is_no_noisier_than_stock(model: TinyModel, parameters: dict[str, Any]) -> None:
    def noise(rows: Any) -> float:
        with Context(file_of(model), model.n_ctx, **parameters) as context:
            assert context.set_head_factors(rows) == 0
            return rms_error(context.decode(TOKENS), model.reference(rows).decode(TOKENS))

    assert no_noisier(float(np.mean([noise(HEAD_FACTORS), noise(OTHER)])), noise(ONES))


def test_a_shift_of_quantized_keys_is_no_noisier_than_stock() -> None:
    """Keys of heads of 64, which llama.cpp keeps through a Hadamard rotation."""
    stock = rms_error(*shifted(WIDE, ONES, type_k=GGML_TYPE_Q8_0))
    assert no_noisier(rms_error(*shifted(WIDE, HEAD_FACTORS, type_k=GGML_TYPE_Q8_0)), stock)


def test_sequences_in_streams_of_their_own_shift() -> None:
    reference = LLAMA.reference(HEAD_FACTORS)
    reference.decode(TOKENS[:N])
    reference.remove(5, 37)
    with Context(file_of(LLAMA), n_seq_max=2, kv_unified=False) as context:
        assert context.set_head_factors(HEAD_FACTORS) == 0
        context.decode(TOKENS[:40], 0)
        context.decode(TOKENS[:N], 1, 0)
        context.lib.llama_memory_seq_rm(context.memory, 1, 5, 37)
        context.lib.llama_memory_seq_add(context.memory, 1, 37, -1, -32)
        got = context.decode(AFTER, 1, N - 32)
        assert relative_error(got, reference.decode(AFTER)) < TOLERANCE
        other = context.decode(TOKENS[40:60], 0, 40)
    assert relative_error(other, LLAMA.reference(HEAD_FACTORS).decode(TOKENS[:60])[40:]) < TOLERANCE


@pytest.mark.parametrize("whole", [True, False])
def test_states_are_for_contexts_with_the_same_factors(whole: bool) -> None:
    sequence = None if whole else 0
    with Context(file_of(LLAMA)) as first, Context(first, 1024) as second:
        assert first.set_head_factors(HEAD_FACTORS) == 0
        first.decode(TOKENS[:N])
        state = first.save(sequence)
        stock = bytes(_state(second, ONES, sequence))
        for rows in (OTHER, ONES, [[1.5, 1.5]] * N_LAYER):
            second.clear()
            assert second.set_head_factors(rows) == 0
            with errors() as logged, pytest.raises(AssertionError):
                second.load(state, sequence)
            assert "rotated with other RoPE factors of KV heads" in "".join(logged)
        second.clear()
        assert second.set_head_factors(HEAD_FACTORS) == 0
        with errors() as logged, pytest.raises(AssertionError):
            second.load((ctypes.c_uint8 * len(stock)).from_buffer_copy(stock), sequence)
        assert "rotated with other RoPE factors of KV heads" in "".join(logged)
        second.load(state, sequence)
        assert second.set_head_factors(ONES) == -3, "the keys that came are turned"
        got = second.decode(AFTER, start=N)
    assert relative_error(got, LLAMA.reference(HEAD_FACTORS).decode(TOKENS)[N : N + MORE]) < TOLERANCE


def _state(context: Context, rows: Any, sequence: int | None) -> Any:
    context.clear()
    assert context.set_head_factors(rows) == 0
    context.decode(TOKENS[:N])
    return context.save(sequence)


# Dynamic scaling: what turns the cached keys knows their heads

N_TRAIN = 32
SCALINGS = {"ntk": Scaling(N_TRAIN), "yarn": Scaling(N_TRAIN, yarn=True), "ntk-2": Scaling(N_TRAIN, factor=2.0)}


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("model", [LLAMA, QWEN3, GEMMA3, LLAMA3], ids=by_name)
def test_dynamic_scaling(model: TinyModel, scaling: str) -> None:
    wanted = SCALINGS[scaling]
    want = DynamicReference(model, wanted, HEAD_FACTORS).decode(TOKENS)
    with Context(file_of(model), **wanted.parameters()) as context:
        assert context.set_head_factors(HEAD_FACTORS) == 0
        got = np.concatenate([context.decode(TOKENS[i : i + 25]) for i in range(0, len(TOKENS), 25)])
        assert relative_error(got, want) < TOLERANCE
        # the same context with other heads, and with heads that agree
        for rows in (OTHER, [[f] * N_HEAD_KV for f in FACTORS]):
            context.clear()
            assert context.set_head_factors(rows) == 0
            known = DynamicReference(model, wanted, rows)
            assert relative_error(context.decode(TOKENS[:60]), known.decode(TOKENS[:60])) < TOLERANCE
            assert relative_error(context.decode(TOKENS[60:]), known.decode(TOKENS[60:])) < TOLERANCE


@pytest.mark.parametrize("scaling", SCALINGS)
def test_dynamic_scaling_shifts_and_its_states(scaling: str) -> None:
    wanted = SCALINGS[scaling]
    known = DynamicReference(LLAMA, wanted, HEAD_FACTORS)
    with Context(file_of(LLAMA), **wanted.parameters()) as first, Context(first, **wanted.parameters()) as second:
        for context in (first, second):
            assert context.set_head_factors(HEAD_FACTORS) == 0
        for stop, tokens in ((90, TOKENS[:100]), (20, TOKENS[100:120]), (25, TOKENS[120:150])):
            first.decode(tokens)
            known.decode(tokens)
            first.shift(5, stop)
            known.reference.remove(5, stop)
        want = known.decode(TOKENS[:40])
        start = first.n_past
        assert relative_error(first.decode(TOKENS[:40]), want) < TOLERANCE
        second.load(first.save())
        assert level_of(second) == level_of(first) > 0
        got = second.decode(TOKENS[40:60], start=start + 40)
    assert relative_error(got, known.decode(TOKENS[40:60])) < TOLERANCE


@pytest.mark.parametrize("yarn", [False, True], ids=["ntk", "yarn"])
def test_dynamic_scaling_of_a_quantized_cache_is_no_noisier_than_stock(yarn: bool) -> None:
    wanted = Scaling(N_TRAIN, yarn=yarn, per_octave=1)
    want = DynamicReference(WIDE, wanted, HEAD_FACTORS).decode(TOKENS)
    with Context(file_of(WIDE), type_k=GGML_TYPE_Q8_0, **wanted.parameters()) as context:
        assert context.set_head_factors(HEAD_FACTORS) == 0
        noise = rms_error(context.decode(TOKENS), want)
    with Context(file_of(WIDE), type_k=GGML_TYPE_Q8_0) as context:
        stock = rms_error(context.decode(TOKENS), expected(WIDE))
    assert no_noisier(noise, 2.0 * stock)


# Every architecture


def near(n: int, s: float) -> Any:
    """Factors that differ from head to head, but not more than float32 can say."""
    values = np.full(n, s, np.float32)
    values[::2] = np.nextafter(values[::2], np.float32(2.0 * s))
    return values


def set_heads(session: Session, values: Any) -> str:
    """The reason why not, else nothing."""
    session.clear()
    address = None if values is None else values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    n = ctypes.c_size_t(0 if values is None else len(values))
    with errors() as logged:
        code = session.lib.raw.llama_set_rope_head_factors(ctypes.c_void_p(session.handle), address, n)
    assert bool(code) == bool(logged)
    assert len(logged) < 2
    return "".join(logged).strip()


def outputs(session: Session) -> tuple[Graphs, dict[str, Any]]:
    """The graphs, and the logits of the last token of each, where there are any."""
    llama, graphs, logits = session.lib.llama, {}, {}
    session.clear()
    for name, step in GRAPHS[session.fixture.graphs]:
        if (name == "shift" and not session.fixture.shift) or not step(session):
            continue
        graphs[name] = session.recorder.take()
        address = llama.llama_get_logits_ith(session.handle, -1)
        if address and name not in ("encode", "inject"):
            logits[name] = np.ctypeslib.as_array(address, (N_VOCAB,)).astype(np.float64)
    return graphs, logits


NAMES = [name for name, fixture in FIXTURES.items() if fixture.target is None]
REFUSAL = "RoPE factors of KV heads cannot be used:"
REASONS = (
    "this model has no RoPE", "not for models with MLA", "not for models with M-RoPE", "layer 0 is rotated by M-RoPE",
    "not for models whose attention has an indexer", "layer 0 is rotated in a way of its own",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_takes_them_or_says_why(name: str, tmp_path: Path) -> None:
    """Heads that hardly differ give the logits of a factor of the layer, in another way."""
    fixture = FIXTURES[name]
    with open_model(fixture, tmp_path) as model, Session(model) as session:
        handle = ctypes.c_void_p(session.handle)
        n = session.lib.raw.llama_get_rope_head_factors(handle, None, ctypes.c_size_t(0))
        if reason := set_heads(session, near(n, 1.3)):
            assert any(f"{REFUSAL} {words}" in reason for words in REASONS)
            assert session.run(), "it still computes"
            return
        graphs, heads = outputs(session)
        assert session.set_factors([1.3] * fixture.n_layer) == 0
        layers_graphs, layers = outputs(session)
    assert heads.keys() == layers.keys()
    for graph in heads:
        assert np.max(np.abs(heads[graph] - layers[graph])) <= 1e-3 * np.std(layers[graph])
    for graph, nodes in graphs.items():
        assert extra(nodes, layers_graphs[graph]).keys() <= {"VIEW", "RESHAPE", "CONT"}


def extra(graph: Graph, base: Graph) -> Counter[str]:
    """The operations that one graph has more than another, which must have none more."""
    ops, others = (Counter(node.op for node in each.nodes) for each in (graph, base))
    assert not others - ops
    return ops - others


def test_what_a_layer_costs(tmp_path: Path) -> None:
    """Views, and one copy of all positions; a copy of queries and of keys where they are parts of one product."""
    costs = {}
    for name in ("llama", "phi3"):
        with open_model(FIXTURES[name], tmp_path) as model, Session(model) as session:
            base = outputs(session)[0]
            assert not set_heads(session, near(2 * N_LAYER, 1.3))
            graphs = outputs(session)[0]
            assert not set_heads(session, np.full(2 * N_LAYER, 1.3, np.float32))
            assert not extra(outputs(session)[0]["prompt"], base["prompt"]), "heads that agree cost nothing"
        costs[name] = [extra(graphs[which], base[which])["CONT"] for which in ("prompt", "token", "shift")]
    assert costs == {"llama": [1, 1, 1], "phi3": [1 + 2 * N_LAYER, 1, 1]}


def test_layers_that_share_keys_share_factors(tmp_path: Path) -> None:
    """Gemma 4's last layers attend to the keys of layers before them: their own factors do not count."""
    fixture = FIXTURES["gemma4"]
    with open_model(fixture, tmp_path) as model, Session(model) as session:
        n = session.lib.raw.llama_get_rope_head_factors(ctypes.c_void_p(session.handle), None, ctypes.c_size_t(0))
        rows = np.linspace(0.8, 3.0, n).astype(np.float32).reshape(fixture.n_layer, -1)
        assert not set_heads(session, rows.ravel())
        got = np.empty_like(rows)
        where = got.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        session.lib.raw.llama_get_rope_head_factors(ctypes.c_void_p(session.handle), where, ctypes.c_size_t(n))
        np.testing.assert_array_equal(got, rows[[0, 1, 2, 3, 2, 3]])
        assert session.run()


# What is refused


def test_refusals_leave_the_factors_alone() -> None:
    with Context(file_of(LLAMA)) as context:
        assert context.set_head_factors(HEAD_FACTORS) == 0
        wrong: list[tuple[Any, int, str]] = [
            (HEAD_FACTORS[:-1], -1, "the list has 10 factors, but the model has 12 KV heads in all layers"),
            ([*ONES[:-1], (1.0, 0.0)], -2, "a bad factor for KV head 1 of layer 5: 0 "),
            ([(float("nan"), 1.0), *ONES[1:]], -2, "a bad factor for KV head 0 of layer 0: nan "),
            ([*ONES[:-1], (1.0, 1025.0)], -2, "(must be a number from 0.000976562 to 1024)"),
        ]
        for rows, code, words in wrong:
            with errors() as logged:
                assert context.set_head_factors(rows) == code
            assert len(logged) == 1 and words in logged[0]
        assert context.get_head_factors() == pytest.approx(FLAT)
        context.decode(TOKENS[:4])
        with errors():
            assert context.set_head_factors(None) == -3
        context.clear()
        assert relative_error(context.decode(TOKENS), LLAMA.reference(HEAD_FACTORS).decode(TOKENS)) < TOLERANCE


def test_multiple_positions_are_refused() -> None:
    """The format has none for M-RoPE, even if heads agree; factors of 1 are none."""
    with Context(file_of(MROPE)) as context:
        for rows in (HEAD_FACTORS, [[1.5, 1.5]] * N_LAYER):
            with errors() as logged:
                assert context.set_head_factors(rows) == -2
            assert logged == [f"set_rope_head_factors: {REFUSAL} not for models with M-RoPE\n"]
        assert context.set_head_factors(ONES) == 0


def with_key(values: Any, factors: list[float] | None = None) -> Path:
    """The tiny llama with the key, and maybe the one that it goes before."""
    name = f"llama-{len(values)}-{hash(tuple(values))}"
    return file_of(replace(LLAMA, name=name, metadata=(("rope.scaling.head_factors", values),)), factors)


def test_the_key_goes_before_the_factors_of_layers_and_is_saved(tmp_path: Path) -> None:
    want, saved = LLAMA.reference(HEAD_FACTORS).decode(TOKENS), tmp_path / "saved.gguf"
    with Context(with_key(FLAT, FACTORS)) as context:
        assert relative_error(context.decode(TOKENS), want) < TOLERANCE
        assert context.model_head_factors(len(FLAT)) == pytest.approx(FLAT)
        assert context.model_head_factors(len(FLAT) - 1) is None
        context.lib.llama_model_save_to_file(context.model, str(saved).encode())
        context.clear()
        assert context.set_factors(None) == 0, "those of the layers alone"
        assert relative_error(context.decode(TOKENS), expected(LLAMA, FACTORS)) < TOLERANCE
    with Context(saved) as context:
        assert context.model_head_factors(len(FLAT)) == pytest.approx(FLAT)
        assert relative_error(context.decode(TOKENS), want) < TOLERANCE


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (FLAT[:-1], "has 11 factors, but the model has 12 KV heads in all layers"),
        ([1] * 12, "must be an array of float32"),
        ([*FLAT[:-1], -1.0], "has a bad factor for KV head 1 of layer 5: -1"),
        ([*FLAT[:-1], float("inf")], "has a bad factor for KV head 1 of layer 5: inf"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(values: list[float], words: str) -> None:
    with errors() as logged, pytest.raises(OSError, match="not loaded"):
        Context(with_key(values))
    assert f"key llama.rope.scaling.head_factors {words}" in "".join(logged)


# The search, and the tools


def test_the_search_sets_them() -> None:
    with Model(file_of(LLAMA), chat=False) as model:
        model.reserve(512)
        for rows in (HEAD_FACTORS, None):
            model.clear()
            model.set_head_factors(rows)
            batch = np.arange(N), np.zeros(N, np.int64), np.ones(N, np.bool_)
            ((_, got),) = model.decode(np.array(TOKENS[:N], np.int32), *batch)
            assert relative_error(got, LLAMA.reference(rows).decode(TOKENS[:N])) < 0.01  # a cache of float16
        model.clear()
        for wrong, words in (([[1.0, 2.0]], "not one a KV head"), ([[1.0, 0.0]] * N_LAYER, "bad factor for KV head 1")):
            with pytest.raises(LropeError, match=words):
                model.set_head_factors(wrong)


def curve(path: Path, **keys: Any) -> Path:
    path.write_text(json.dumps({"format": "lrope-curve", "version": 1, **keys}))
    return path


def test_the_option_and_what_the_server_says(tmp_path: Path) -> None:
    model, file = write_readable(tmp_path / "tiny.gguf"), curve(tmp_path / "heads.json", head_factors=HEAD_FACTORS)
    heads = tmp_path / "with-key.gguf"
    keyed = replace(READABLE, metadata=(*READABLE.metadata, ("rope.scaling.head_factors", FLAT)))
    write_readable(heads, keyed)

    def served(path: Path, *options: str) -> tuple[list[float], list[float], str, str]:
        with LlamaServer(path, 512, n_threads=1, options=options) as server:
            props = server.properties()
            answer = server.complete("The quick brown fox jumps over the lazy ", 16)
            return props["rope_head_factors"], props["rope_layer_factors"], answer, server.log

    base, option = served(model), served(model, "--rope-head-factors", str(file))
    assert base[0] == [] and option[0] == pytest.approx(FLAT)
    assert option[1] == [1.0, 1.0, 1.5, 1.0, 1.0, 1.0]
    assert base[2] != option[2]
    line = "RoPE factors of KV heads from 0.6 to 3.1, 9 of 12 KV heads differ from 1"
    assert line in option[3] and "KV heads" not in base[3]
    written, off = served(heads), served(heads, "--rope-head-factors", "off")
    assert written[:3] == option[:3] and off[:3] == base[:3]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "has no head_factors"),
        ({"head_factors": HEAD_FACTORS[1:]}, "head_factors must be a list of 6 lists, one for each layer"),
        ({"head_factors": [[1.0], *HEAD_FACTORS[1:]]}, "layer 0 of head_factors must be a list of 2 numbers"),
        ({"head_factors": [[1.0, "x"], *HEAD_FACTORS[1:]]}, "layer 0 of head_factors must be a list of 2 numbers"),
        ({"head_factors": [[1.0, 0.0], *HEAD_FACTORS[1:]]}, "the model cannot use these factors"),
        ({"head_factors": HEAD_FACTORS, "block_count": 7}, "made for another model than this one"),
        (None, "not a file that can be read"),
    ],
)
def test_what_cannot_be_used_ends_the_tool(keys: dict[str, Any] | None, words: str, tmp_path: Path) -> None:
    file = tmp_path / "missing.json" if keys is None else curve(tmp_path / "heads.json", **keys)
    model = write_readable(tmp_path / "tiny.gguf")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 12)
    command = [tool_path("llama-perplexity"), "-m", model, "-f", tmp_path / "text.txt", "-c", "64", "-t", "1"]
    command += ["--rope-head-factors", file]
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert result.returncode != 0
    assert f"--rope-head-factors {file}: {words}" in result.stdout + result.stderr


def test_factors_are_no_value_to_override(tmp_path: Path) -> None:
    model = write_readable(tmp_path / "tiny.gguf")
    command = [tool_path("llama-perplexity"), "-m", model, "--override-kv", "llama.rope.scaling.head_factors=float:1"]
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert result.returncode != 0
    assert "factors of KV heads are a list, use --rope-head-factors" in result.stdout + result.stderr
