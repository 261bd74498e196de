"""Query scales of heads: a float64 reference, folded weights, the graphs of every architecture, states and refusals."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support import arch_models, llama_direct, tiny_models
from support.arch_models import FIXTURES, PROMPT, Graphs, LeanModel, Session, library, open_model
from support.arch_models import Model as ArchModel
from support.dynamic_rope import Scaling
from support.gguf_fixtures import read_keys
from support.graph_nodes import Node, origin, viewed
from support.llama_direct import Context
from support.rope_models import (
    EUROBERT,
    FACTORS,
    GEMMA3,
    LLAMA,
    MROPE,
    N_HEAD,
    N_LAYER,
    PARTIAL,
    QWEN2,
    QWEN3,
    TOKENS,
    WIDE_32,
    WIDE_64,
    YARN,
    TinyModel,
    Weights,
    by_name,
    expected,
    file_of,
)
from support.rope_reference import TOLERANCE, Array, no_noisier, relative_error, rms_error
from support.tiny_models import write_readable

from lrope_gguf.errors import LropeError
from lrope_gguf.native import tool_path
from lrope_search.demo.server import LlamaServer
from lrope_search.evaluation.model import FactorsRefusedError, Model

pytestmark = pytest.mark.native

KEY = "attention.query_scales"
N = N_LAYER * N_HEAD
# a layer and heads without any; none very large, since a sharp attention makes roundings large too
SCALES = np.round(np.exp(np.random.default_rng(28).uniform(-0.7, 0.7, (N_LAYER, N_HEAD))), 3)
SCALES[1], SCALES[2, 0], SCALES[3, 1] = 1.0, 1.0, 1 / 16
LIST = SCALES.ravel().tolist()
ONES = [1.0] * N
OTHER = LIST[::-1]
MODELS = (LLAMA, QWEN2, QWEN3, GEMMA3, YARN, PARTIAL, MROPE)


def with_scales(model: TinyModel, scales: Any = LIST, name: str = "scaled") -> TinyModel:
    return replace(model, name=f"{model.name}-{name}", metadata=(*model.metadata, (KEY, scales)))


@cache
def reference(model: TinyModel) -> Array:
    return model.reference(scales=SCALES).decode(TOKENS)


@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_scales_of_the_file_and_of_the_call_equal_the_reference(model: TinyModel) -> None:
    with Context(file_of(with_scales(model)), model.n_ctx) as file, Context(file_of(model), model.n_ctx) as context:
        assert file.model_scales(N) == file.get_scales() == pytest.approx(LIST)
        assert context.model_scales(N) is None and context.get_scales() == ONES
        assert context.set_scales(LIST) == 0
        assert context.get_scales() == pytest.approx(LIST)
        got = context.decode(TOKENS)
        np.testing.assert_array_equal(file.decode(TOKENS), got)
    assert relative_error(got, reference(model)) < TOLERANCE
    assert relative_error(expected(model), reference(model)) > 0.1, "they must matter, or the test proves nothing"


@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_flash_attention_is_no_noisier_than_without_scales(model: TinyModel) -> None:
    with Context(file_of(model), model.n_ctx, flash=True) as context:
        stock = rms_error(context.decode(TOKENS), expected(model))
        context.clear()
        assert context.set_scales(LIST) == 0
        assert no_noisier(rms_error(context.decode(TOKENS), reference(model)), stock)


@pytest.mark.parametrize("model", [LLAMA, GEMMA3], ids=by_name)
@pytest.mark.parametrize("flash", [False, True])
def test_one_token_at_a_time(model: TinyModel, flash: bool) -> None:
    with Context(file_of(with_scales(model)), flash=flash) as context:
        got = np.concatenate([context.decode([token]) for token in TOKENS[:60]])
    assert relative_error(got, reference(model)[:60]) < (0.05 if flash else TOLERANCE)


def test_with_layer_factors_and_a_context_shift() -> None:
    reference = LLAMA.reference(FACTORS, SCALES)
    with Context(file_of(with_scales(LLAMA), FACTORS)) as context:
        assert relative_error(context.decode(TOKENS[:60]), reference.decode(TOKENS[:60])) < TOLERANCE
        context.shift(5, 20)
        reference.remove(5, 20)
        # llama.cpp keeps the values of what it drops: later layers of both remember it
        assert relative_error(context.decode(TOKENS[60:90]), reference.decode(TOKENS[60:90])) < TOLERANCE


# Powers of two: a product with them is exact, so that equal means to the bit
POWERS = 2.0 ** np.random.default_rng(5).integers(-4, 5, (N_LAYER, N_HEAD))
ALIKE = np.repeat(POWERS[:, :1], N_HEAD, axis=1)


def folded(model: TinyModel, scales: NDArray[np.float64]) -> Weights:
    """The weights with the scales in the rows of the queries, or in their norm, which undoes what stands before it."""
    weights, dim = model.weights(), model.config.head_dim
    for il, of_layer in enumerate(scales):
        name = f"blk.{il}.attn_{'qkv' if model.fused else 'q'}"
        normed = f"blk.{il}.attn_q_norm.weight"
        if normed in weights:
            weights[normed] = (weights[normed] * of_layer[0]).astype(np.float32)
            continue
        for tensor in (t for t in (f"{name}.weight", f"{name}.bias") if t in weights):
            rows = np.ones(len(weights[tensor]))
            rows[: len(of_layer) * dim] = np.repeat(of_layer, dim)
            weights[tensor] = (weights[tensor].T * rows).T.astype(np.float32)
    return weights


@pytest.mark.parametrize("model", MODELS, ids=by_name)
@pytest.mark.parametrize("flash", [False, True])
def test_folded_weights_compute_the_same_bits(model: TinyModel, flash: bool, tmp_path: Path) -> None:
    scales = ALIKE if model in (QWEN3, GEMMA3) else POWERS
    path = model.write(tmp_path / "folded.gguf", weights=folded(model, scales))
    with Context(file_of(model), model.n_ctx, flash=flash) as context, Context(path, model.n_ctx, flash=flash) as fold:
        assert context.set_scales(scales.ravel().tolist()) == 0
        np.testing.assert_array_equal(context.decode(TOKENS[:40]), fold.decode(TOKENS[:40]))
        np.testing.assert_array_equal(context.decode(TOKENS[40:41]), fold.decode(TOKENS[40:41]))


@pytest.mark.parametrize("scaling", [Scaling(32), Scaling(32, yarn=True)], ids=["ntk", "yarn"])
def test_folded_weights_under_dynamic_scaling(scaling: Scaling, tmp_path: Path) -> None:
    """Its levels, which turn the cached keys, are found in a graph that has the multiplications too."""
    path, how = QWEN2.write(tmp_path / "folded.gguf", weights=folded(QWEN2, POWERS)), scaling.parameters()
    with Context(file_of(QWEN2), **how) as context, Context(path, **how) as fold:
        assert context.set_scales(POWERS.ravel().tolist()) == 0
        for start in range(0, len(TOKENS), 50):
            part = TOKENS[start : start + 50]
            np.testing.assert_array_equal(context.decode(part), fold.decode(part))


@pytest.mark.parametrize("model", [WIDE_32, WIDE_64], ids=by_name)
def test_folded_weights_with_a_quantized_cache(model: TinyModel, tmp_path: Path) -> None:
    """llama.cpp turns the queries of heads of 64 before they meet such keys."""
    scales = POWERS[:, : model.config.n_head]
    path = model.write(tmp_path / "folded.gguf", weights=folded(model, scales))
    how: dict[str, Any] = {"type_kv": llama_direct.GGML_TYPE_Q8_0, "flash": True}
    with Context(file_of(model), **how) as context, Context(path, **how) as fold:
        assert context.set_scales(scales.ravel().tolist()) == 0
        np.testing.assert_array_equal(context.decode(TOKENS[:40]), fold.decode(TOKENS[:40]))


def test_an_encoder() -> None:
    model = with_scales(EUROBERT)
    tokens = TOKENS[:50]
    with Context(file_of(model), embeddings=True) as context:
        got = context.embed(tokens, [0] * len(tokens), EUROBERT.config.n_embd)
    hidden = EUROBERT.reference(scales=SCALES).hidden(tokens).mean(axis=0, keepdims=True)
    assert relative_error(got, hidden) < TOLERANCE


# Setting


@pytest.mark.parametrize("model", [LLAMA, GEMMA3], ids=by_name)
def test_change_is_exact_and_forgets_nothing(model: TinyModel) -> None:
    """Same batch shape each time, so that the graph of the step before would be reused if nothing forbade it."""
    with Context(file_of(with_scales(model)), model.n_ctx) as context, Context(file_of(model), model.n_ctx) as stock:
        first = context.decode(TOKENS[:40])
        results = []
        for scales in (OTHER, ONES, None, OTHER):
            context.clear()
            assert context.set_scales(scales) == 0
            assert context.get_scales() == pytest.approx(LIST if scales is None else scales)
            results.append(context.decode(TOKENS[:40]))
        np.testing.assert_array_equal(results[1], stock.decode(TOKENS[:40]))
    np.testing.assert_array_equal(results[2], first)
    np.testing.assert_array_equal(results[3], results[0])
    other = model.reference(scales=np.reshape(OTHER, SCALES.shape)).decode(TOKENS[:40])
    assert relative_error(results[0], other) < TOLERANCE


def test_ones_in_the_file_change_no_bit() -> None:
    with Context(file_of(LLAMA)) as base, Context(file_of(with_scales(LLAMA, ONES, "ones"))) as context:
        assert context.model_scales(N) == ONES
        np.testing.assert_array_equal(base.decode(TOKENS), context.decode(TOKENS))
        assert bytes(base.save()) == bytes(context.save())


def test_refusals_leave_the_scales_alone() -> None:
    with Context(file_of(with_scales(LLAMA))) as context, llama_direct.errors() as errors:
        for wrong in ([], LIST[:-1], [*LIST, 1.0]):
            array = (ctypes.c_float * max(1, len(wrong)))(*wrong)
            assert context.lib._lib.llama_set_query_scales(context.context, array, len(wrong)) == -1
        for bad in (0.0, -1.0, float("nan"), float("inf"), 0.0624, 16.01):
            assert context.set_scales([*LIST[:-1], bad]) == -2, bad
        assert context.set_scales([1 / 16, 16.0] * (N // 2)) == context.set_scales(None) == 0
        context.decode(TOKENS[:4])
        assert context.set_scales(OTHER) == context.set_scales(None) == -3
        assert context.get_scales() == pytest.approx(LIST)
    assert all(text.count("\n") == 1 for text in errors)
    assert errors[0] == "set_query_scales: the list has 0 query scales, but the model has 24 heads in all layers\n"
    place = "set_query_scales: the list has a bad query scale for head 3 of layer 5: "
    assert errors[-3] == f"{place}16.01 (must be a number from 0.0625 to 16)\n"


def test_getting_writes_all_or_nothing() -> None:
    with Context(file_of(with_scales(LLAMA))) as context:
        lib = context.lib._lib
        for n in (0, N - 1, N, N + 1):
            of_context, of_model = ((ctypes.c_float * (N + 2))(*[-7.0] * (N + 2)) for _ in range(2))
            assert lib.llama_get_query_scales(context.context, of_context, n) == N
            assert list(of_context) == pytest.approx([*(LIST if n >= N else [-7.0] * N), -7.0, -7.0])
            assert lib.llama_model_query_scales(context.model, of_model, n) == (n == N)
            assert list(of_model) == pytest.approx([*(LIST if n == N else [-7.0] * N), -7.0, -7.0])


BAD_KEYS: dict[str, tuple[Any, str]] = {
    "short": (LIST[:-1], f"key llama.{KEY} has 23 query scales, but the model has 24 heads in all layers"),
    "integers": ([1] * N, f"key llama.{KEY} must be an array of float32"),
    "scalar": (1.5, f"key llama.{KEY} must be an array of float32"),
    "nan": ([*LIST[:-1], float("nan")], f"key llama.{KEY} has a bad query scale for head 3 of layer 5: nan"),
    "large": ([*LIST[:-1], 17.0], "head 3 of layer 5: 17 (must be a number from 0.0625 to 16)"),
}


@pytest.mark.parametrize("name", BAD_KEYS)
def test_a_file_with_others_is_not_loaded(name: str) -> None:
    value, message = BAD_KEYS[name]
    with llama_direct.errors() as errors, pytest.raises(OSError, match="not loaded"):
        Context(file_of(with_scales(LLAMA, value, name)))
    assert message in errors[0] and errors[0].count("\n") == 1


def test_saving_the_model_keeps_them(tmp_path: Path) -> None:
    for model, scales in ((LLAMA, None), (with_scales(LLAMA), LIST)):
        path = tmp_path / f"{model.name}.gguf"
        with Context(file_of(model)) as context:
            context.lib.llama_model_save_to_file(context.model, str(path).encode())
        assert read_keys(path).get(f"llama.{KEY}") == (None if scales is None else pytest.approx(scales))


# States


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("factors", [None, FACTORS])
def test_a_state_goes_on_under_its_own_scales(whole: bool, factors: list[float] | None) -> None:
    path, sequence = file_of(with_scales(LLAMA), factors), None if whole else 0
    with Context(path) as first, Context(file_of(LLAMA, factors)) as second:
        first.decode(TOKENS[:60])
        state = first.save(sequence)
        assert second.set_scales(LIST) == 0
        second.load(state, sequence)
        got = second.decode(TOKENS[60:], start=60)
    reference = LLAMA.reference(factors, SCALES)
    reference.decode(TOKENS[:60])
    assert relative_error(got, reference.decode(TOKENS[60:])) < TOLERANCE


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("of_state", "own", "place"),
    [
        (LIST, None, f"a query scale of {LIST[0]:g} for head 0 of layer 0, this context has 1"),
        (None, LIST, f"a query scale of 1 for head 0 of layer 0, this context has {LIST[0]:g}"),
        (LIST, [*LIST[:-1], 2.0], f"a query scale of {LIST[-1]:g} for head 3 of layer 5, this context has 2"),
    ],
)
def test_a_state_of_other_scales_is_refused(
    whole: bool, of_state: list[float] | None, own: list[float] | None, place: str
) -> None:
    """Nothing of it is used: what is in the memory stays."""
    sequence = None if whole else 0
    with Context(file_of(LLAMA)) as first, Context(first) as second, Context(first) as third:
        assert first.set_scales(of_state) == 0 and second.set_scales(own) == 0 and third.set_scales(own) == 0
        first.decode(TOKENS[:60])
        second.decode(TOKENS[:20])
        third.decode(TOKENS[:20])
        state = first.save(sequence)
        with llama_direct.errors() as errors, pytest.raises(AssertionError):
            second.load(state, sequence)
        assert place in "".join(errors)
        if not whole:  # llama.cpp clears the sequence that it would restore
            return
        np.testing.assert_array_equal(second.decode(TOKENS[20:30]), third.decode(TOKENS[20:30]))


# The graphs of every architecture

_SCALED = re.compile(r"q_scaled-(\d+)")
REFUSED = {
    "minimax-m3": "computes attention in a way of its own",
    "glm5-next": "computes attention in a way of its own",
    "wavtokenizer-dec": "computes attention in a way of its own",
    "t5": "an encoder and a decoder with layers of the same numbers",
    **dict.fromkeys(("mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"), "has no attention"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("architectures")


def heads(model: ArchModel) -> list[int]:
    return [library().raw.llama_model_n_head_layer(model.handle, il) for il in range(model.fixture.n_layer)]


def set_scales(session: Session, scales: list[float] | None) -> str:
    """Why they are refused, if they are; None: those of the file."""
    array = None if scales is None else (ctypes.c_float * len(scales))(*scales)
    with llama_direct.errors() as errors:
        status = library().raw.llama_set_query_scales(session.handle, array, len(scales or []))
    assert bool(status) == bool(errors)
    return "".join(errors)


def graphs_of(model: ArchModel, scales: list[float] | None, **extra: int) -> tuple[Graphs, str]:
    """All graphs of a fixture under these scales, or none and why they are refused."""
    with ExitStack() as stack:
        target = None
        if model.fixture.target is not None:
            target = stack.enter_context(Session(stack.enter_context(open_model(model.fixture.target, Path()))))
        session = stack.enter_context(Session(model, target, **extra))
        refusal = set_scales(session, scales)
        return ({} if refusal else session.run()), refusal


def chain(node: Node) -> Iterator[Node]:
    """What a tensor was made of, along the first source."""
    while True:
        yield node
        if not node.sources:
            return
        node = node.sources[0]


@pytest.mark.parametrize("name", FIXTURES)
def test_every_attention_has_the_scales_of_its_layer(name: str, folder: Path) -> None:
    fixture = FIXTURES[name]
    flash = {"flash_attn_type": int(fixture.arch != "plm")}  # llama.cpp aborts with it
    with open_model(fixture, folder) as model:
        n_head = heads(model)
        assert max(n_head) > 0 == library().raw.llama_model_n_head_layer(model.handle, fixture.n_layer)
        base, _ = graphs_of(model, None, **flash)
        scaled, refusal = graphs_of(model, [2.0] * sum(n_head), **flash)
    assert (REFUSED.get(fixture.arch, "nothing") in refusal) == (fixture.arch in REFUSED)
    for key, graph in scaled.items():
        added = [n for n in graph.nodes if _SCALED.fullmatch(n.name)]
        views = [n for n in graph.nodes if n.op == "VIEW" and n.view_of and n.view_of.name.startswith("query_scales-")]
        assert len(graph.nodes) == len(base[key].nodes) + len(added) + len(views)
        found = []
        for end in (n for n in graph.nodes if n.op == "FLASH_ATTN_EXT"):
            made_of = [n for n in chain(end.sources[0]) if n in added]
            assert len(made_of) == 1 or fixture.arch == "graniteswitch", "its router is no layer of the file"
            found += made_of
        assert found == added or not found
        assert added or (key == "encode" and fixture.graphs in ("eagle3", "dflash")) or key == "inject"
        for node in added:
            layer = int(node.name.removeprefix("q_scaled-")) % fixture.n_layer
            leaf = viewed(node.sources[1])
            assert leaf is not None and leaf.name == f"query_scales-{layer}"
            # its passes through the same weights are layers of their own
            assert origin(node)[0] in (None, layer) or fixture.arch == "hrm_text"


# where `attn_q` is not all that makes the queries of attention
NOT_FOLDED = {
    "olmo": "its queries are clamped", "llama4": "its queries are normed without weights",
    "hrm_text": "its passes share their weights", "bailingmoe3": "MLA: attn_q belongs to its linear attention",
    "bailingmoe3-text": "the same", "kimi-k3": "the same", "llama-embed": "gives no logits",
}  # fmt: skip


def prompt_logits(model: ArchModel, scales: list[float] | None) -> NDArray[np.float32] | None:
    lib = library()
    with Session(model) as session:
        if set_scales(session, scales):
            return None
        session.process(PROMPT)
        n = lib.llama.llama_vocab_n_tokens(lib.llama.llama_model_get_vocab(model.handle))
        return np.ctypeslib.as_array(lib.llama.llama_get_logits(session.handle), (PROMPT, n)).copy()


def test_every_architecture_computes_what_its_folded_weights_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit: heads of their own in the rows of `attn_q`; all heads of a layer alike where a norm follows."""
    values = arch_models._values
    equal, different = [], []
    for name, fixture in FIXTURES.items():
        from_file = not fixture.virtual or fixture.file_first
        if from_file or fixture.target or fixture.mtp or fixture.graphs not in ("decoder", "vision"):
            continue
        with ArchModel(fixture) as model:
            if not any(tensor.endswith(".attn_q.weight") for tensor in model.tensors):
                continue
            norm = "_norm" * any(".attn_q_norm." in tensor for tensor in model.tensors)
            n_head = heads(model)
            rows = [[2.0 ** ((3 * il + 2 * h * (not norm)) % 5 - 2) for h in range(n)] for il, n in enumerate(n_head)]
            base, scaled = (prompt_logits(model, scales) for scales in (None, [s for row in rows for s in row]))

        def folded(tensor: str, n: int, rows: Any = rows, norm: str = norm) -> NDArray[np.float32]:
            match = re.fullmatch(rf"blk\.(\d+)\.attn_q{norm}\.(weight|bias)", tensor)
            scales = rows[int(match[1])] if match else []
            return (values(tensor, n).reshape(max(len(scales), 1), -1).T * np.float32(scales or [1])).T.ravel()

        with monkeypatch.context() as patch:
            patch.setattr(arch_models, "_values", folded)
            with ArchModel(fixture) as model:
                fold = prompt_logits(model, None)
        if scaled is not None:
            (equal if np.array_equal(scaled, fold) and not np.array_equal(scaled, base) else different).append(name)
    assert set(different) == NOT_FOLDED.keys()
    assert len(equal) > 110


# Options


@pytest.fixture(scope="module")
def readable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_readable(tmp_path_factory.mktemp("option") / "tiny.gguf")


def curve(path: Path, scales: Any = None, **fields: Any) -> Path:
    rows = SCALES.tolist() if scales is None else scales
    path.write_text(json.dumps({"format": "lrope-curve", "version": 1, "query_scales": rows} | fields))
    return path


def served(path: Path, *options: str) -> tuple[list[float], str, str]:
    """Scales in /props, the greedy answer, and the log."""
    with LlamaServer(path, 512, n_threads=1, options=options) as server:
        return (
            server.properties()["query_scales"],
            server.complete("A key has a value, so what is it? ", 16),
            server.log,
        )


def test_the_server_takes_them_from_option_and_file(readable: Path, tmp_path: Path) -> None:
    scales = np.clip(SCALES**3, 1 / 16, 16.0)  # an answer of so few tokens hardly notices less
    written = write_readable(
        tmp_path / "written.gguf", replace(LLAMA, metadata=((KEY, np.float32(scales).ravel().tolist()),))
    )
    rows = curve(tmp_path / "curve.json", scales.tolist(), layer_factors=FACTORS)
    base, option, file = served(readable), served(readable, "--query-scales", str(rows)), served(written)
    off = served(written, "--query-scales", "off")
    assert base[0] == off[0] == []
    assert option[0] == file[0] == pytest.approx(scales.ravel())
    assert base[1] == off[1] != option[1] == file[1]
    line = "query scales from 0.0625 to"
    assert [text.count(line) for _, _, text in (base, option, file, off)] == [0, 1, 1, 0]


def perplexity(path: Path, *options: str) -> tuple[int, str]:
    text = path.with_name("text.txt")
    text.write_text("The quick brown fox jumps over the lazy dog. " * 12)
    command = [tool_path("llama-perplexity"), "-m", path, "-f", text, "-c", "64", "-t", "1", *options]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


BAD_FILES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "null": (None, {"query_scales": None}, "has no query_scales"),
    "flat": (LIST, {}, "query_scales must be a list of 6 lists, one for each layer"),
    "short": (SCALES[1:].tolist(), {}, "query_scales must be a list of 6 lists, one for each layer"),
    "shape": ([[1.0] * (3 + il % 2 * 2) for il in range(6)], {}, "layer 0 of query_scales must be a list of 4 numbers"),
    "text": ([["1"] * 4] * 6, {}, "layer 0 of query_scales must be a list of 4 numbers, one for each head"),
    "large": ([[1.0, 1.0, 1.0, 17.0]] * 6, {}, "bad query scale for head 3 of layer 0: 17 (must be"),
    "other model": (None, {"architecture": "gemma3"}, "made for another model than this one (llama, 6 layers)"),
    "format": (None, {"format": "list"}, "not a curve file (format lrope-curve, version 1)"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_what_cannot_be_used_ends_the_tool_and_says_why(name: str, readable: Path, tmp_path: Path) -> None:
    scales, fields, message = BAD_FILES[name]
    path = curve(tmp_path / "curve.json", scales, **fields)
    status, text = perplexity(readable, "--query-scales", str(path))
    assert status == 1 and message in text and f"--query-scales {path}: " in text


def test_neither_a_missing_file_nor_a_value_to_override(readable: Path) -> None:
    status, text = perplexity(readable, "--query-scales", "missing.json")
    assert status == 1 and "--query-scales missing.json: not a file that can be read" in text
    status, text = perplexity(readable, "--override-kv", f"llama.{KEY}=float:1.5")
    assert status == 1 and "query scales are a list, use --query-scales" in text


# The search's binding


def log_probabilities(model: Model, tokens: list[int]) -> NDArray[np.float32]:
    model.clear()
    n = len(tokens)
    rows = model.decode(np.array(tokens), np.arange(n), np.zeros(n, np.int64), np.ones(n, np.bool_))
    return np.concatenate([logits.copy() for _, logits in rows])


def test_the_model_of_the_search(readable: Path) -> None:
    tokens = TOKENS[:20]
    with Model(readable, n_threads=1, n_gpu_layers=0, flash_attention=False) as model:
        assert (model.n_head, model.n_head_kv) == ((N_HEAD,) * N_LAYER, (2,) * N_LAYER)
        model.reserve(64)
        base = log_probabilities(model, tokens)
        with pytest.raises(LropeError, match=r"query scales: refused by llama\.cpp: the memory is not empty; change"):
            model.set_query_scales(SCALES.tolist())
        model.clear()
        model.set_query_scales(SCALES.tolist())
        scaled = log_probabilities(model, tokens)
        model.clear()
        with pytest.raises(LropeError, match=r"query scales: not one a head; .* has, layer by layer, 4 4 4 4 4 4 h"):
            model.set_query_scales(SCALES[:, 1:].tolist())
        with pytest.raises(FactorsRefusedError, match="bad query scale for head 0 of layer 0: 17"):
            model.set_query_scales(np.full_like(SCALES, 17.0).tolist())
        model.set_query_scales(None)
        np.testing.assert_array_equal(log_probabilities(model, tokens), base)
    reference = tiny_models.readable(LLAMA).reference(scales=SCALES)
    exact = reference.decode(tokens)
    assert relative_error(scaled, exact) < 0.02  # keys and values are F16
    assert relative_error(base, exact) > 0.2


def test_an_older_library_says_so_in_one_line(readable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Model(readable, n_threads=1, n_gpu_layers=0) as model:
        monkeypatch.delattr(model._llama, "llama_set_query_scales")
        with pytest.raises(LropeError, match=r"query scales: this llama\.cpp lacks their patch; use the library"):
            model.set_query_scales(SCALES.tolist())


def test_a_prediction_head_keeps_1(tmp_path: Path) -> None:
    path = write_readable(tmp_path / "m.gguf", n_head_layers=1)
    rows = SCALES.tolist()
    with Model(path, n_threads=1, n_gpu_layers=0) as model:
        assert model.n_head == (N_HEAD,) * N_LAYER
        model.reserve(64)
        model.set_query_scales(rows)
        out = (ctypes.c_float * (N + N_HEAD))()
        assert library().raw.llama_get_query_scales(model._context, out, len(out)) == len(out)
        assert list(out) == pytest.approx([*LIST, *ONES[:N_HEAD]])
    values = []
    for of_head in ([], [ONES[:N_HEAD]]):
        status, text = perplexity(path, "--query-scales", str(curve(tmp_path / "curve.json", rows + of_head)))
        assert status == 0
        values.append(re.findall(r"\[\d+\]([0-9.]+)", text))
    assert values[0] == values[1] != []


def test_heads_that_differ_from_layer_to_layer(folder: Path) -> None:
    with LeanModel(FIXTURES["granitehybrid"], folder):
        pass
    with Model(folder / "granitehybrid.gguf", n_threads=1, n_gpu_layers=0, chat=False) as model:
        assert model.n_head == model.n_head_kv == (2, 0, 2, 0, 2, 0)
