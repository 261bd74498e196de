"""Every architecture that can be folded: the attention logits of each head are times its scale, of no other head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support import llama_direct
from support.arch_models import FIXTURES, MLA, Fixture, LeanModel, Model, Session, library, open_model
from support.graph_nodes import GgmlTensor

from lrope_gguf import LropeError, read_model, write_factors
from lrope_gguf.fold import _KNOWN, Wanted

pytestmark = pytest.mark.native

NAMES = [n for n, f in FIXTURES.items() if f.arch in _KNOWN and f.graphs in ("decoder", "vision", "encoder")]
CLAMPED = ("dbrx", "mpt", "olmo")


class Written(Model):
    """A model from a file."""

    def __init__(self, fixture: Fixture, path: Path) -> None:
        self.fixture, self.lib = fixture, library()
        params = self.lib.llama.llama_model_default_params()
        params.load_mtp = True
        with llama_direct.errors() as errors:
            self.handle = self.lib.llama.llama_model_load_from_file(str(path).encode(), params)
        self._check(errors)


class Logits:
    """The products of keys and queries by layer, shape (heads, queries, keys): a context's ``cb_eval``."""

    def __init__(self) -> None:
        self.lib = library()
        self.found: dict[int, NDArray[np.float32]] = {}
        self.callback = self.lib.llama.ggml_backend_sched_eval_callback(self._visit)

    def _visit(self, address: int, ask: bool, _: object) -> bool:
        tensor = GgmlTensor.from_address(address)
        if not tensor.name.startswith(b"kq-"):
            return not ask
        if not ask and (layer := int(tensor.name[3:])) not in self.found:
            out = np.empty(tuple(tensor.ne)[2::-1], np.float32)
            self.lib.raw.ggml_backend_tensor_get(address, out.ctypes.data, 0, out.nbytes)
            self.found[layer] = out
        return True


def written(fixture: Fixture, folder: Path) -> Path:
    """The fixture with every tensor that it knows, in a file."""
    path = folder / f"{fixture.name}.gguf"
    with open_model(fixture, folder) as model:
        tensors = model.tensors
    with library().metadata(fixture) as metadata:
        kept = library().add_tensors(metadata, tensors)
        assert library().raw.gguf_write_to_file(metadata, str(path).encode(), False), kept
    return path


def logits(fixture: Fixture, path: Path) -> dict[int, NDArray[np.float32]]:
    seen = Logits()
    with Written(fixture, path) as model, Session(model, cb_eval=seen.callback, type_k=0, type_v=0) as session:
        session.process(9, encode=False)
    return seen.found


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_each_head(name: str, tmp_path: Path) -> None:
    fixture = FIXTURES[name]
    metadata = {**fixture.metadata, "attention.clamp_kqv": 0.0 if fixture.arch in CLAMPED else None}
    if MLA.items() <= metadata.items():
        metadata["attention.head_count"] = 2
    fixture = replace(fixture, metadata=metadata)
    check(fixture, written(fixture, tmp_path), tmp_path / "folded.gguf")
    if fixture.virtual:  # with fused weights, where it can have them
        with LeanModel(replace(fixture, name="lean"), tmp_path) as model:
            fused = {"blk.0.attn_qkv.weight"} <= model.tensors.keys()
        if fused:
            check(fixture, tmp_path / "lean.gguf", tmp_path / "folded.gguf", only_first=True)


def check(fixture: Fixture, path: Path, folded: Path, only_first: bool = False) -> None:
    """Fold one layer at a time: what stands before it is the same, and its logits are times the scales."""
    base = logits(fixture, path)
    info = read_model(path)
    heads, kv = info.n_head, info.n_head_kv
    assert heads is not None and kv is not None
    tried = [layer for layer in sorted(base) if layer < fixture.n_layer and heads[layer] and kv[layer]]
    for layer in {tried[0], tried[0 if only_first else -1]}:
        q = np.linspace(1.5, 0.75, heads[layer]).astype(np.float32)
        try:
            fold(path, folded, heads, layer, q)
        except LropeError as error:
            assert "one weight for all heads" in str(error)
            q[:] = 1.5
            fold(path, folded, heads, layer, q)
        got = logits(fixture, folded)
        assert all((got[before] == base[before]).all() for before in base if before < layer)
        wanted = base[layer].astype(np.float64) * q[:, None, None]
        assert np.abs(wanted).max() > 0
        assert np.abs(got[layer] - wanted).max() < 1e-5 * np.abs(wanted).max()


def fold(path: Path, folded: Path, heads: Sequence[int], layer: int, q: NDArray[np.float32]) -> None:
    rows = [[1.0] * n if number != layer else q.tolist() for number, n in enumerate(heads)]
    write_factors(path, fold=Wanted(tuple(map(tuple, rows)), "q"), output=folded)


def test_what_limits_its_queries_is_refused(tmp_path: Path) -> None:
    path = written(FIXTURES["olmo"], tmp_path)
    with pytest.raises(LropeError, match=r"limits its queries \(olmo.attention.clamp_kqv\)"):
        fold(path, tmp_path / "folded.gguf", [2] * 6, 0, np.full(2, 1.5, np.float32))
