"""Every rotation of every architecture has the factor of its layer, and nothing else differs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from support.arch_models import (
    FACTORS,
    FIXTURES,
    UNUSABLE,
    Fixture,
    Graphs,
    LeanModel,
    Model,
    audit,
    library,
    names_in_source,
    runs,
)
from support.graph_nodes import (
    Graph,
    RopeNode,
    RopeParams,
    by_cache,
    by_weights,
    compare,
    compare_ropes,
    demanded,
    differences,
)
from support.rope_reference import Rope

from lrope_gguf.model_info import read_model

pytestmark = pytest.mark.native
NAMES = list(FIXTURES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("architectures")


@pytest.mark.parametrize("name", NAMES)
def test_every_rotation_has_the_factor_of_its_layer(name: str, folder: Path) -> None:
    fixture = FIXTURES[name]
    result = audit(fixture, folder)
    assert not result.problems
    assert set(range(fixture.n_layer)) - result.layers == fixture.without
    # what rotates nothing must say so when it is given factors
    assert bool(result.refusal) == (not result.layers)
    assert "has no RoPE" in (result.refusal or "has no RoPE")


COUNTED = [name for name, fixture in FIXTURES.items() if fixture.metadata.get("nextn_predict_layers")]


@pytest.mark.parametrize("name", [*COUNTED, "deepseek4-mtp without its head", "graniteswitch", "nanbeige-looped"])
def test_a_header_counts_the_layers_as_the_library_does(name: str, folder: Path) -> None:
    fixture = FIXTURES[name.partition(" ")[0]]
    if "without" in name:
        fixture = replace(fixture, tensors={}, mtp=False)
    with LeanModel(fixture, folder) as model:
        counted = library().llama.llama_model_n_layer(model.handle)
    info = read_model(folder / f"{fixture.name}.gguf")
    assert info.block_count == fixture.n_layer
    assert info.n_layer == min(counted, fixture.n_layer)


def test_factors_differ_from_layer_to_layer_and_from_1() -> None:
    assert len({*FACTORS, 1.0}) == len(FACTORS) + 1
    assert max(fixture.n_layer for fixture in FIXTURES.values()) <= len(FACTORS)


def test_every_architecture_of_the_gguf_package_has_a_fixture() -> None:
    audited = {fixture.arch for fixture in FIXTURES.values()} | UNUSABLE.keys()
    others = [name for name in gguf.MODEL_ARCH_NAMES.values() if name not in audited]
    # one that this version of the library does not know is not missing
    assert all("unknown model architecture" in loading_error(name) for name in others)


def test_every_architecture_of_the_source_has_a_fixture(source: Path) -> None:
    names = names_in_source(source)
    assert len(names) > 140
    assert names == {fixture.arch for fixture in FIXTURES.values()} | UNUSABLE.keys()


@pytest.mark.parametrize("name", UNUSABLE)
def test_architectures_without_a_fixture_cannot_be_loaded_at_all(name: str) -> None:
    assert UNUSABLE[name] in loading_error(name)


def loading_error(arch: str) -> str:
    with pytest.raises(OSError) as error, Model(Fixture(arch, arch)):
        pass
    return str(error.value)


@pytest.fixture(scope="module")
def llama() -> tuple[Graphs, Graphs]:
    """A llama with YaRN: its graphs without factors and with them."""
    with Model(FIXTURES["llama-yarn"]) as model:
        base, scaled = runs(model, None, FACTORS[: model.fixture.n_layer])
    return base, scaled


def test_the_recorder_reads_a_known_model(llama: tuple[Graphs, Graphs]) -> None:
    graph = llama[0]["shift"]
    assert {"ROPE", "MUL_MAT", "RMS_NORM", "SOFT_MAX"} <= {node.op for node in graph.nodes}
    computed = [node for node in graph.ropes() if not node.shift]
    # queries and keys; names are given after the rotation
    assert Counter(node.name for node in computed) == Counter(f"{x}cur-{il}" for x in "QK" for il in range(6))
    assert [node.weights for node in computed] == [node.cache for node in computed] == sorted([*range(6)] * 2)
    assert [node.cache for node in graph.ropes() if node.shift] == list(range(6))
    scale = 1.0 / (1.0 + 0.1 * math.log(4.0))
    for node in graph.ropes():
        p = node.params
        assert p == RopeParams(32, 0, 64, 10000.0, 0.25, 1.0, p.attn_factor, 32.0, 1.0, (0,) * 4, 0)
        # llama.cpp cancels the magnitude that ggml adds, and applies get_mscale(4) = 1 + 0.1 ln(4) once
        assert p.attn_factor == pytest.approx(scale * (1.0 + 0.1 * math.log(4.0)))


def tampered(nodes: Sequence[RopeNode], **changes: object) -> list[RopeNode]:
    """The same rotations, with the given parameters of the last one changed."""
    last = nodes[-1]
    return [*nodes[:-1], replace(last, params=last.params._replace(**changes))]  # type: ignore[arg-type]


WRONG: dict[str, object] = {
    "freq_scale": 0.25, "ext_factor": 1.0, "attn_factor": 1.0, "freq_base": 10001.0, "n_dims": 30, "mode": 2,
    "n_ctx_orig": 63, "beta_fast": 31.0, "beta_slow": 2.0, "sections": (1, 0, 0, 0), "offset": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_the_audit_notices_one_wrong_parameter(llama: tuple[Graphs, Graphs], name: str) -> None:
    base, scaled = (graphs["token"].ropes() for graphs in llama)
    assert compare_ropes(base, tampered(scaled), FACTORS, by_weights) == []
    problems = compare_ropes(base, tampered(scaled, **{name: WRONG[name]}), FACTORS, by_weights)
    assert len(problems) == 1 and f"of layer 5: {name}" in problems[0]


def test_the_audit_notices_swapped_factors_and_missing_nodes(llama: tuple[Graphs, Graphs]) -> None:
    base, scaled = (graphs["token"] for graphs in llama)
    swapped = [FACTORS[1], FACTORS[0], *FACTORS[2:]]
    # three parameters of two rotations in two layers
    assert len(compare(base, scaled, swapped, by_weights)) == 3 * 2 * 2
    fewer = Graph(tuple(node for node in scaled.nodes if node.name != "Kcur-3"))
    problems = compare(base, fewer, FACTORS, by_weights)
    assert len(problems) == 2 and "nodes instead of" in problems[0] and "other rotations" in problems[1]
    assert compare(base, base, FACTORS, by_weights), "without factors everything is wrong"


def test_exact_means_to_the_bit(llama: tuple[Graphs, Graphs]) -> None:
    base = llama[0]["token"].ropes()
    changed = tampered(base, freq_scale=float(np.nextafter(np.float32(0.25), np.float32(1.0))))
    assert not compare_ropes(base, changed, [1.0] * 6, by_weights)
    assert compare_ropes(base, changed, [1.0] * 6, by_weights, exact=True)


def test_the_rules_notice_contradictions(llama: tuple[Graphs, Graphs]) -> None:
    node = next(iter(llama[0]["token"].ropes()))
    with pytest.raises(ValueError, match="weights of layer 0, cache of layer 3"):
        by_weights(replace(node, cache=3))
    with pytest.raises(ValueError, match="no key cache"):
        by_cache(replace(node, cache=None))


@pytest.mark.parametrize("factor", [0.6, 1.3, 2.0, 7.5])
@pytest.mark.parametrize(("scale", "ext"), [(1.0, 0.0), (0.25, 0.0), (0.25, 1.0), (0.25, 0.5), (1.0, 1.0), (0.1, 1.0)])
def test_what_the_audit_demands_is_the_angle_at_the_divided_position(scale: float, ext: float, factor: float) -> None:
    base = RopeParams(64, 2, 128, 10000.0, scale, ext, 0.9, 32.0, 1.0, (0,) * 4, 0)
    positions = np.array([[1.0], [7.0], [100.0], [4096.0]])
    stock, scaled = (rope(params) for params in (base, demanded(base, factor)))
    np.testing.assert_allclose(scaled.angles(positions), stock.angles(positions / factor), rtol=1e-12)
    assert scaled.magnitude == pytest.approx(stock.magnitude, rel=1e-12)


def rope(p: RopeParams) -> Rope:
    return Rope(
        p.n_dims, p.freq_base, p.freq_scale, p.ext_factor, p.attn_factor, p.n_ctx_orig, p.beta_fast, p.beta_slow
    )


def test_a_few_roundings_are_no_difference() -> None:
    base = RopeParams(64, 2, 128, 10000.0, 0.25, 1.0, 0.9, 32.0, 1.0, (0,) * 4, 0)
    assert not list(differences(base._replace(attn_factor=0.9 * (1 + 1e-7)), base))
    assert list(differences(base._replace(attn_factor=0.9 * (1 + 1e-6)), base))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-oss", "deepseek2", "deepseek4", "gemma4", "qwen3next"])
def test_flash_attention(name: str) -> None:
    assert_exact(FIXTURES[name], flash_attn_type=1)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_context_shift_of_quantized_keys(name: str) -> None:
    # llama.cpp shifts quantized keys of such heads only
    wide = {"attention.key_length": 64, "attention.value_length": 64, "rope.dimension_count": 64}
    fixture = replace(FIXTURES[name], metadata=FIXTURES[name].metadata | wide)
    nodes = assert_exact(fixture, type_k=8)["shift"].ropes()
    # one after another for each of two caches, if there are windows
    assert sorted(node.cache or 0 for node in nodes if node.shift) == list(range(fixture.n_layer))


def assert_exact(fixture: Fixture, **extra: int) -> Graphs:
    factors = FACTORS[: fixture.n_layer]
    with Model(fixture) as model:
        base, scaled = runs(model, None, factors, **extra)
    for graph, before in base.items():
        assert compare(before, scaled[graph], factors, fixture.layer_of) == []
    return base


def test_a_draft_model_without_keys_rotates_as_its_targets_layers(folder: Path) -> None:
    """Its windows read the keys of the target's last layer but one, its full attention those of the last."""
    fixture = FIXTURES["gemma4-assistant"]
    assert [f.name for f in FIXTURES.values() if f.follows] == [fixture.name]
    with LeanModel(fixture, folder) as model:
        (graphs,) = runs(model, FACTORS[:4])
    nodes = graphs["token"].ropes()
    assert [(node.weights, node.cache) for node in nodes] == [(0, 2), (1, 2), (2, 2), (3, 3)]
    scales = [node.params.freq_scale for node in nodes]
    assert scales == pytest.approx([1.0 / FACTORS[2]] * 3 + [1.0 / FACTORS[3]])
