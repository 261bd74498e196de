"""Cached keys of every architecture, after the scaling moved, are those that were rotated at the new level at once.

The output of attention is zero in these models, so that no hidden state depends on a rotation: the keys of a context
whose scaling moved must be those of a static context, element by element.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support import arch_models
from support.arch_models import FIXTURES, Model, Session, open_model
from support.dynamic_rope import Scaling

pytestmark = pytest.mark.native

N_TRAIN, N_TOKENS = 16, 24
LEVEL = 2  # what 24 tokens need, and exactly twice the length
RATIO = 2.0
PROBE = 12345.0  # no architecture has this base

# what the library says of those that it refuses
NO_ROPE, NO_KEYS = "this model has no RoPE", "this model has no KV cache with rotated keys"
NEVER = "the layers of this model that have RoPE are never scaled"
M_ROPE, LONGROPE = "not for models with M-RoPE", "not for models with LongRoPE"
WEIGHTED = "not for this model, the key of layer 0 is weighted after its rotation"
MEMORY = "not for the memory of this model"
MULTIPLIER = "not YaRN for models with a YaRN multiplier of their own (yarn_log_multiplier)"
FIXED = "not NTK for this architecture, which has a fixed frequency base"
REFUSED = {
    name: words
    for words, names in {
        NO_ROPE: "gpt2 mpt refact bloom mamba mamba2 jamba jais nemotron_h nemotron_h_moe rwkv6 rwkv6qwen2 rwkv7 "
        "arwkv7 kimi-linear kimi-k3 glm5-next baichuan-alibi",
        NO_KEYS: "starcoder llama-embed granite-no-rope granitehybrid-no-rope graniteswitch-no-rope",
        # only their layers with a sliding window rotate, or all by constants
        NEVER: "muse-glimmer maple cogvlm",
        M_ROPE: "qwen2vl qwen3vl qwen3vlmoe qwen35 qwen35moe qwen4exp qwen3tts glm4 glm4moe hunyuan_vl paddleocr "
        "bailingmoe3 dflash-mrope",
        LONGROPE: "minicpm3 phimoe",
        # a norm with weights comes after the rotation
        WEIGHTED: "hunyuan-dense hunyuan-moe hunyuan_vl-text maincoder",
        # several caches, of compressed keys or of indexers
        MEMORY: "deepseek32 deepseek4 glm-dsa dots3note hy_v4 minimax-m3",
    }.items()
    for name in names.split()
}
REFUSED_KIND = {
    ("deepseek2-ocr", "ntk"): FIXED,
    ("deepseek2-ocr", "yarn"): NEVER,
    ("dflash-dspark", "yarn"): NEVER,
    ("deepseek2-log-mul", "yarn"): MULTIPLIER,
}
# those that make text, in a cache of their own
NAMES = [
    name
    for name, f in FIXTURES.items()
    if f.target is None and f.graphs not in ("encoder", "encoder-decoder", "prediction") and not f.follows
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dynamic")


@pytest.fixture(autouse=True)
def _attention_gives_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = arch_models._values

    def without_attention(name: str, n: int) -> NDArray[np.float32]:
        return np.zeros(n, np.float32) if "attn_output" in name or "attn_out." in name else values(name, n)

    monkeypatch.setattr(arch_models, "_values", without_attention)


def cache_of(model: Model, **parameters: Any) -> NDArray[np.float32]:
    """What a context keeps of the tokens, without the mark that says at which level its keys are."""
    with Session(model, type_k=0, type_v=0, **parameters) as s:
        s.process(N_TOKENS)
        lib = s.lib.llama
        size = lib.llama_state_seq_get_size(s.handle, 0)
        data = (ctypes.c_uint8 * size)()
        assert lib.llama_state_seq_get_data(s.handle, data, size, 0) == size
        if parameters.get("rope_scaling_type", 0) > 3:
            assert lib._lib.llama_rope_dynamic_level(s.handle) == LEVEL
    state = bytes(data)[8:]  # magic, sequence
    if state.startswith(b"lrop"):
        state = state[4 + 4 + 16 + 12 + 4 :]  # magic, version, what a level changes, YaRN's ramp, number of factors
    return np.frombuffer(state[: len(state) // 4 * 4], np.float32)


def scaled_base(model: Model, factor: float) -> float:
    """The base at `LEVEL`, from what the graphs of the model have without scaling."""
    parameters = []
    for base in (PROBE, 0.0):
        with Session(model, rope_scaling_type=0, rope_freq_base=base) as s:
            parameters.append([node.params for graph in s.run().values() for node in graph.ropes()])
    follows = [stock for probe, stock in zip(*parameters, strict=True) if probe.freq_base == PROBE]
    ((n_dims, base),) = {(p.n_dims, p.freq_base) for p in follows}
    return float(base * (factor * RATIO - (factor - 1.0)) ** (n_dims / (n_dims - 2)))


@pytest.mark.parametrize("kind", ["ntk", "yarn"])
@pytest.mark.parametrize("name", NAMES)
def test_moved_keys_are_those_of_a_static_context(name: str, kind: str, folder: Path) -> None:
    fixture = FIXTURES[name]
    factor = fixture.metadata.get("rope.scaling.factor", 1.0) if kind == "ntk" else 1.0
    assert isinstance(factor, float)
    scaling = Scaling(N_TRAIN, yarn=kind == "yarn").parameters() | {"rope_freq_scale": 1.0 / factor}
    refusal = REFUSED.get(name, REFUSED_KIND.get((name, kind)))
    with open_model(fixture, folder) as model:
        if refusal is not None:
            with pytest.raises(OSError, match="dynamic RoPE scaling: ") as error:
                cache_of(model, **scaling)
            assert str(error.value).strip().endswith(f"dynamic RoPE scaling: {refusal}")
            return
        moved = cache_of(model, **scaling)
        if kind == "yarn":
            static = cache_of(model, rope_scaling_type=2, rope_freq_scale=1.0 / RATIO, yarn_orig_ctx=N_TRAIN)
        else:
            static = cache_of(model, rope_scaling_type=0, rope_freq_base=scaled_base(model, factor))
        unscaled = cache_of(model, rope_scaling_type=0)
    effect = float(np.max(np.abs(unscaled - static)))
    assert effect > 1e-3
    assert np.max(np.abs(moved - static)) < 1e-4 * max(1.0, effect)


def test_every_refusal_names_a_fixture() -> None:
    assert REFUSED.keys() | {name for name, _ in REFUSED_KIND} <= set(NAMES)
