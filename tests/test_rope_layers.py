"""Which layers rotate over the whole of a context, as the library says: against audited graphs and known windows."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.arch_models import FIXTURES, N_LAYER, Model, Session, open_model
from support.graph_nodes import compare

from lrope_gguf.errors import LropeError
from lrope_search.launch import _layers

native = pytest.mark.native

NAMES = [name for name, fixture in FIXTURES.items() if fixture.target is None and not fixture.mtp]
WINDOW = 32  # attention.sliding_window of the fixtures, of which not all architectures take notice
ALL = set(range(N_LAYER))


def layers(session: Session, n_tokens: int) -> set[int]:
    """What llama_rope_layers says."""
    n = session.fixture.n_layer
    out = (ctypes.c_bool * n)()
    function, handle = session.lib.raw.llama_rope_layers, ctypes.c_void_p(session.handle)
    assert function(handle, ctypes.c_uint32(n_tokens), None, ctypes.c_size_t(0)) == n
    assert function(handle, ctypes.c_uint32(n_tokens), out, ctypes.c_size_t(n)) == n
    return {layer for layer, rotates in enumerate(out) if rotates}


# of a model of `N_LAYER` layers, or as many as its fixture has: those that attend to the keys of another layer
SHARED = {"gemma4": {4, 5}, "gemma3n": {20, 21}}


@native
@pytest.mark.parametrize("name", NAMES)
def test_the_layers_that_rotate(name: str, tmp_path: Path) -> None:
    """The fixtures' graphs are audited: which layers rotate nothing is known. For one token, no window is too short."""
    fixture = FIXTURES[name]
    with open_model(fixture, tmp_path) as model, Session(model) as session:
        rotating = set(range(fixture.n_layer)) - fixture.without
        assert layers(session, 1) == rotating - SHARED.get(name.partition("-")[0], set())
        # within a window nothing is too far, beyond it only windows go
        assert layers(session, WINDOW) == layers(session, 1) >= layers(session, 10**6)
        assert session.run()  # it still computes


@native
@pytest.mark.parametrize(
    ("name", "far"),
    [
        ("llama", ALL), ("qwen2", ALL), ("smollm3", ALL - {3}), ("lfm2", {0, 2, 4}),
        # from the models' papers: a period of local layers before each global one, here as the fixtures' pattern has it
        ("gemma2", {1, 3, 5}), ("gemma3", {1, 3, 5}), ("gpt-oss", {1, 3, 5}), ("olmo2", {1, 3, 5}),
        ("gemma4", {3}),  # layers 4 and 5 attend to the keys of 2 and 3
        # global layers do not rotate
        ("cohere2", set()), ("exaone-moe", set()), ("maple", set()), ("llama4", {1, 5}), ("deepseek4", ALL),
    ],
)  # fmt: skip
def test_windows_are_too_short_for_long_contexts(name: str, far: set[int], tmp_path: Path) -> None:
    with Model(FIXTURES[name]) as model, Session(model) as session:
        assert layers(session, 10**6) == far


@native
def test_factors_of_the_context_stay(tmp_path: Path) -> None:
    fixture = FIXTURES["llama"]
    with Model(fixture) as model, Session(model) as session:
        factors = [1.0 + layer / 8 for layer in range(N_LAYER)]
        assert session.set_factors(factors) == 0
        before = session.run()
        assert layers(session, 1) == ALL
        after = session.run()
    for graph, nodes in before.items():
        assert not list(compare(nodes, after[graph], [1.0] * N_LAYER, fixture.layer_of, exact=True))


def test_a_search_needs_a_layer_that_rotates_over_the_whole_context() -> None:
    info: Any = SimpleNamespace(path="m.gguf")
    facts: Any = SimpleNamespace(layers=(), longest=4000)
    with pytest.raises(LropeError, match=r"^m\.gguf: no layer rotates over a whole context of 4000 tokens"):
        _layers(info, facts)
    facts.layers = (1, 3)
    assert _layers(info, facts) == (1, 3)
