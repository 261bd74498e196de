"""Hostile GGUF files for the patched loader: cases that are bad in one known way, and mutants.

Of a structured case it is known what the loader must do with it: load it, or refuse it with a message that names the
key and, for a bad value, the layer. Mutants are files whose header was damaged at random: they may load or be refused.
Whoever loads a file (a test, or proofs/fuzz_loader.cpp with sanitizers) prints what became of it in lines that
`parse_output` reads: `@file PATH`, then `@ok`, `@refused MESSAGE`, or anything and `@died STATUS`.
"""

from __future__ import annotations

import itertools
import random
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import gguf
import numpy as np

from lrope_gguf.gguf_file import GGUFFile
from support.gguf_fixtures import finish, string, u32, u64
from support.rope_models import LLAMA, YARN, TinyModel
from support.tiny_models import write_without_rope

KEY = "llama.rope.scaling.layer_factors"
LAYERS = 4
MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
FACTORS = (1.0, 1.25, 2.0, 0.75)
DAMAGED = "damaged bytes"  # the kind of the mutants

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
SIZES = {U8: 1, I8: 1, U16: 2, I16: 2, U32: 4, I32: 4, F32: 4, BOOL: 1, U64: 8, I64: 8, F64: 8}
TYPE_NAMES = ("u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64")


def floats(values: Sequence[float]) -> bytes:
    """The bytes of float32 values."""
    return struct.pack(f"<{len(values)}f", *values)


def scalar(kind: int, value: bytes) -> bytes:
    return u32(kind) + value


def array(kind: int, n: int, content: bytes) -> bytes:
    """A GGUF array that claims ``n`` elements, whatever ``content`` holds."""
    return u32(ARRAY) + u32(kind) + u64(n) + content


def factors(values: Sequence[float]) -> bytes:
    return array(F32, len(values), floats(values))


def one(kind: int) -> bytes:
    """The value 1 of a type: as an element of an array or alone."""
    if kind == STRING:
        return string(b"1")
    if kind == ARRAY:
        return u32(F32) + u64(1) + floats([1.0])
    if kind in (F32, F64):
        return struct.pack("<f" if kind == F32 else "<d", 1.0)
    return (1).to_bytes(SIZES[kind], "little")


@dataclass(frozen=True)
class Model:
    """A GGUF file in pieces; a pair is a key and its value with the type in front."""

    pairs: tuple[tuple[str, bytes], ...]
    n_tensors: int
    tensors: bytes
    data: bytes

    @classmethod
    def read(cls, path: Path) -> Model:
        """Take a valid file apart."""
        data = path.read_bytes()
        with GGUFFile(path) as gguf:
            keys = {key: entry.start + 8 + len(key.encode()) for key, entry in gguf.entries.items()}
            pairs = tuple((key, data[keys[key] : entry.end]) for key, entry in gguf.entries.items())
            return cls(pairs, gguf.n_tensors, data[gguf.kv_end : gguf.info_end], data[_aligned(gguf.info_end) :])

    def put(self, key: str, value: bytes) -> Model:
        if key not in dict(self.pairs):
            return replace(self, pairs=(*self.pairs, (key, value)))
        return replace(self, pairs=tuple((k, value if k == key else v) for k, v in self.pairs))

    def add(self, key: str, value: bytes) -> Model:
        return replace(self, pairs=(*self.pairs, (key, value)))

    def drop(self, key: str) -> Model:
        return replace(self, pairs=tuple(pair for pair in self.pairs if pair[0] != key))

    def header(self, *, n_pairs: int | None = None, n_tensors: int | None = None, version: int = 3) -> bytes:
        """All before the data, with other counts if they are given."""
        counts = (self.n_tensors if n_tensors is None else n_tensors, len(self.pairs) if n_pairs is None else n_pairs)
        start = b"GGUF" + struct.pack("<IQQ", version, *counts)
        return start + b"".join(string(key.encode()) + value for key, value in self.pairs) + self.tensors

    def with_header(self, header: bytes) -> bytes:
        return header.ljust(_aligned(len(header)), b"\0") + self.data

    def file(self) -> bytes:
        return self.with_header(self.header())

    def span(self, key: str) -> tuple[int, int]:
        at = 24
        for name, value in self.pairs:
            stop = at + 8 + len(name.encode()) + len(value)
            if name == key:
                return at, stop
            at = stop
        raise KeyError(key)


def _aligned(n: int) -> int:
    return -(-n // 32) * 32


def seed_model(folder: Path, model: TinyModel = LLAMA) -> Model:
    """A valid file of ``model``, cut down to four layers and about 25 KB, with factors."""
    c = replace(model.config, n_vocab=16, n_embd=16, n_head=1, n_head_kv=1, n_ff=16)
    c = replace(c, ropes=c.ropes[:LAYERS], windows=c.windows[:LAYERS])
    return Model.read(replace(model, config=c).write(folder / f"{model.name}.gguf", list(FACTORS)))


def shared_model(folder: Path) -> Model:
    """A Gemma 4: its last two layers attend to the keys of the two before, one with a window and one without."""
    arch, n_embd, n_ff, window = "gemma4", 16, 16, [True, False] * (LAYERS // 2)
    writer = gguf.GGUFWriter(folder / "gemma4.gguf", arch)
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_sliding_window(8)
    writer.add_array(f"{arch}.attention.sliding_window_pattern", window)
    for key, value in {"key_length_swa": n_embd, "value_length_swa": n_embd, "shared_kv_layers": 2}.items():
        writer.add_uint32(f"{arch}.attention.{key}", value)
    writer.add_uint32(f"{arch}.embedding_length_per_layer_input", 0)
    writer.add_vocab_size(16)
    writer.add_tokenizer_model("no_vocab")
    writer.add_array(KEY.replace("llama", arch), list(FACTORS))
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (16, n_embd),
        "output_norm.weight": (n_embd,),
        "rope_freqs.weight": (n_embd // 2,),
    }
    for il in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            shapes[f"blk.{il}.{name}.weight"] = (n_embd, n_embd)
        for name in ("attn", "attn_q", "attn_k", "post_attention", "ffn", "post_ffw"):
            shapes[f"blk.{il}.{name}_norm.weight"] = (n_embd,)
    return Model.read(finish(writer, {name: np.ones(shape, np.float32) for name, shape in shapes.items()}))


Verdict = Literal["ok", "refused", "any"]


@dataclass(frozen=True)
class Case:
    """One file, what must become of it, and the words that the message must have."""

    kind: str
    name: str
    file: bytes
    verdict: Verdict = "any"
    words: tuple[str, ...] = ()


def _bits(value: int) -> float:
    (result,) = struct.unpack("<f", u32(value))
    return float(result)


GOOD_VALUES = {"one": 1.0, "largest": 1024.0, "smallest": 1 / 1024}
# NaN stays bits: a signalling one does not survive a conversion
BAD_VALUES = {
    "NaN": 0x7FC00000, "negative NaN": 0xFFC00000, "signalling NaN": 0x7F800001, "infinity": 0x7F800000,
    "negative infinity": 0xFF800000, "zero": 0, "negative zero": 0x80000000, "negative": 0xBFC00000, "denormal": 1,
    "largest denormal": 0x007FFFFF, "FLT_MIN": 0x00800000, "FLT_MAX": 0x7F7FFFFF, "1e30": 0x7149F2CA,
    "above 1024": 0x44800001, "below 1/1024": 0x3A7FFFFF,
}  # fmt: skip


def value_cases(model: Model, kind: str) -> Iterator[Case]:
    for layer in range(LAYERS):
        for name, bits in BAD_VALUES.items():
            content = bytearray(floats(FACTORS))
            content[4 * layer : 4 * layer + 4] = u32(bits)
            file = model.put(KEY, array(F32, LAYERS, bytes(content))).file()
            yield Case(kind, f"{name} in layer {layer}", file, "refused", (KEY, f"layer {layer}"))
        for name, value in GOOD_VALUES.items():
            values = [*FACTORS[:layer], value, *FACTORS[layer + 1 :]]
            yield Case(kind, f"{name} in layer {layer}", model.put(KEY, factors(values)).file(), "ok")


def length_cases(model: Model) -> Iterator[Case]:
    """Arrays that are too short or too long, and as long as they should be."""
    for n in (0, 1, LAYERS - 1, LAYERS, LAYERS + 1, MAX_LAYERS, MAX_LAYERS + 1, 1_000_000):
        file = model.put(KEY, array(F32, n, floats([1.5]) * n)).file()
        if n == LAYERS:
            yield Case("length", f"{n} factors", file, "ok")
        else:
            yield Case("length", f"{n} factors", file, "refused", (KEY, f"{n} factors"))


def type_cases(model: Model) -> Iterator[Case]:
    for kind, name in enumerate(TYPE_NAMES):
        if kind != F32:
            file = model.put(KEY, array(kind, LAYERS, one(kind) * LAYERS)).file()
            yield Case("element type", f"array of {name}", file, "refused", (KEY,))
        if kind != ARRAY:
            file = model.put(KEY, scalar(kind, one(kind))).file()
            yield Case("scalar", name, file, "refused", (KEY,))
    for kind in (13, 255, 2**31, 2**32 - 1):
        file = model.put(KEY, array(kind, LAYERS, bytes(4 * LAYERS))).file()
        yield Case("element type", f"array of type {kind}", file, "refused", (KEY,))
        file = model.put(KEY, scalar(kind, bytes(4))).file()
        yield Case("scalar", f"type {kind}", file, "refused", (KEY,))


def claim_cases(model: Model) -> Iterator[Case]:
    """Arrays that claim more than the file holds: nothing of that size may be allocated."""
    for n in (10**9, 2**30, 2**31, 2**32 - 1, 2**32, 2**61, 2**62, 2**62 + LAYERS, 2**63 - 1, 2**63, 2**64 - 1):
        for kind in (F32, U8, STRING, F64):
            file = model.put(KEY, array(kind, n, floats(FACTORS))).file()
            yield Case("claimed length", f"{n} elements of {TYPE_NAMES[kind]}", file, "refused")


def key_cases(model: Model, without_rope: Model) -> Iterator[Case]:
    """The key twice, under another architecture, and in a model that has no RoPE."""
    good, bad = factors(FACTORS), factors([float("nan")] * LAYERS)
    yield Case("duplicate key", "equal", model.add(KEY, good).file(), "refused", (KEY,))
    yield Case("duplicate key", "bad second", model.add(KEY, bad).file(), "refused", (KEY,))
    for key in ("qwen2.rope.scaling.layer_factors", "rope.scaling.layer_factors", f"{KEY}2", KEY[:-1], KEY.upper()):
        yield Case("other key", key, model.drop(KEY).add(key, bad).file(), "ok")
    for name in ("qwen2", "gemma3", "mamba", "clip", "mpt", "", "unknown", "llama\0", "x" * 1000):
        file = model.put("general.architecture", scalar(STRING, string(name.encode()))).file()
        yield Case("architecture", name[:10], file, "any")
    key = "mpt.rope.scaling.layer_factors"
    yield Case("architecture", "without RoPE", without_rope.put(key, factors([1.5])).file(), "refused", ("RoPE",))


def block_count_cases(model: Model) -> Iterator[Case]:
    key = "llama.block_count"
    for n in (1, LAYERS - 1, LAYERS + 1, MAX_LAYERS):
        file = model.put(key, scalar(U32, u32(n))).file()
        yield Case("block_count", str(n), file, "refused", (KEY, f"{LAYERS} factors", f"{n} layers"))
    for n in (0, MAX_LAYERS + 1, 2**16, 2**31, 2**32 - 1):
        yield Case("block_count", str(n), model.put(key, scalar(U32, u32(n))).file())
    yield Case("block_count", "missing", model.drop(key).file(), "refused")
    for kind, name in enumerate(TYPE_NAMES):
        if kind not in (U32, ARRAY):
            yield Case("block_count", f"as {name}", model.put(key, scalar(kind, one(kind))).file())
    for n in (1, LAYERS, LAYERS + 1, 2**32 - 1):
        file = model.put("llama.nextn_predict_layers", scalar(U32, u32(n))).file()
        yield Case("nextn_predict_layers", str(n), file)


def yarn_cases(yarn: Model) -> Iterator[Case]:
    """Hostile RoPE scaling keys beside good factors, and factors at YaRN's singularity."""
    # the scale of the file is 4, so the frequency scale is 1/4
    for layer in range(LAYERS):
        values = [*FACTORS[:layer], 0.25, *FACTORS[layer + 1 :]]
        yield Case("YaRN", f"singular in layer {layer}", yarn.put(KEY, factors(values)).file(), "refused", ("layer",))
    hostile = [_bits(bits) for bits in BAD_VALUES.values()]
    names = ("factor", "attn_factor", "yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow")
    for key, value in itertools.product(names, hostile):
        file = yarn.put(f"llama.rope.scaling.{key}", scalar(F32, struct.pack("<f", value))).file()
        yield Case("RoPE keys", f"{key} {value:g}", file)
    for value in hostile:
        file = yarn.put("llama.rope.freq_base", scalar(F32, struct.pack("<f", value))).file()
        yield Case("RoPE keys", f"freq_base {value:g}", file)
    for key, n in itertools.product(
        ("llama.rope.scaling.original_context_length", "llama.rope.dimension_count", "llama.context_length"),
        (0, 1, 2**31, 2**32 - 1),
    ):
        yield Case("RoPE keys", f"{key} {n}", yarn.put(key, scalar(U32, u32(n))).file())
    for name in ("none", "linear", "longrope", "", "unknown"):
        file = yarn.put("llama.rope.scaling.type", scalar(STRING, string(name.encode()))).file()
        yield Case("RoPE keys", f"type {name!r}", file)


def looped_cases(model: Model) -> Iterator[Case]:
    """Layers that run several times, and counts with which fewer run than the file has factors."""
    key = "nanbeige.rope.scaling.layer_factors"
    for n_loops, n_layer, n_nextn in itertools.product((1, 2, 128, 129, 2**32 - 1), (LAYERS, 10), (0, 3, 6)):
        looped = model.put("nanbeige.num_loops", scalar(U32, u32(n_loops)))
        looped = looped.put("nanbeige.block_count", scalar(U32, u32(n_layer)))
        looped = looped.put("nanbeige.nextn_predict_layers", scalar(U32, u32(n_nextn)))
        file = looped.put(key, factors([1.5] * n_layer)).file()
        fewer = (n_loops, n_layer, n_nextn) == (2, 10, 6)
        yield Case("loops", f"{n_loops} times {n_layer} - {n_nextn} layers", file, "ok" if fewer else "any")


def shared_cases(model: Model) -> Iterator[Case]:
    """Layers that attend to the keys of a layer that does not exist."""
    yield Case("shared keys", "2 layers", model.file(), "ok")
    for n in (0, 1, LAYERS - 1, LAYERS, LAYERS + 1, 2**31, 2**32 - 1):
        file = model.put("gemma4.attention.shared_kv_layers", scalar(U32, u32(n))).file()
        yield Case("shared keys", f"{n} layers", file, "refused" if n in (LAYERS - 1, LAYERS) else "any")


def count_cases(model: Model) -> Iterator[Case]:
    n_pairs, huge = len(model.pairs), (2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
    for n in (0, 1, n_pairs - 1, n_pairs + 1, *huge):
        yield Case("header", f"{n} keys", model.with_header(model.header(n_pairs=n)))
    for n in (0, model.n_tensors - 1, model.n_tensors + 1, *huge):
        yield Case("header", f"{n} tensors", model.with_header(model.header(n_tensors=n)))
    for n in (0, 1, 2, 4, 2**16, 2**24 * 3, 2**32 - 1):
        yield Case("header", f"version {n}", model.with_header(model.header(version=n)))
    start, _ = model.span(KEY)
    for n in (0, 1, len(KEY) - 1, len(KEY) + 1, *huge):
        header = bytearray(model.header())
        header[start : start + 8] = u64(n)
        yield Case("header", f"key of {n} bytes", model.with_header(bytes(header)), "refused")
    for n in (0, 1, 3, 2**16, 2**31, 2**32 - 1):
        yield Case("header", f"alignment {n}", model.put("general.alignment", scalar(U32, u32(n))).file())


def truncated_cases(model: Model, step: int) -> Iterator[Case]:
    """The file cut at every ``step``-th byte of the header, at every byte of the factors, and in the data."""
    file, header = model.file(), len(model.header())
    start, stop = model.span(KEY)
    cuts = {*range(0, header, step), *range(start, stop + 1), header, _aligned(header), len(file) - 1}
    for n in sorted(cuts):
        yield Case("truncated", f"after {n} bytes", file[:n], "refused")


def structured_cases(folder: Path, step: int = 1) -> list[Case]:
    """All cases that are bad in one known way; truncated at every ``step``-th byte."""
    plain, yarn = seed_model(folder), seed_model(folder, YARN)
    without_rope = Model.read(write_without_rope(folder / "mpt.gguf"))
    return [
        Case("unchanged", "plain", plain.file(), "ok"),
        Case("unchanged", "without factors", plain.drop(KEY).file(), "ok"),
        Case("unchanged", "YaRN", yarn.file(), "ok"), Case("unchanged", "without RoPE", without_rope.file(), "ok"),
        *length_cases(plain), *type_cases(plain), *value_cases(plain, "value"), *value_cases(yarn, "value with YaRN"),
        *claim_cases(plain), *key_cases(plain, without_rope), *block_count_cases(plain), *yarn_cases(yarn),
        *looped_cases(seed_model(folder, replace(YARN, name="nanbeige", arch="nanbeige"))),
        *shared_cases(shared_model(folder)), *count_cases(plain), *truncated_cases(plain, step),
    ]  # fmt: skip


INTERESTING = (0, 1, 2, 3, 5, 6, 8, 9, 127, 128, 255, 256, 511, 512, 513, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
LONG = (*INTERESTING, 2**32, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 10**9)


def _hostile(rng: random.Random) -> bytes:
    return u32(rng.choice((*BAD_VALUES.values(), rng.getrandbits(32))))


def _nudged(rng: random.Random, old: bytes) -> bytes:
    return u64((int.from_bytes(old, "little") + rng.choice((-8, -4, -1, 1, 4, 8))) % 2**64)


OVERWRITES: tuple[tuple[int, Callable[[random.Random, bytes], bytes]], ...] = (
    (1, lambda rng, old: bytes([old[0] ^ 1 << rng.randrange(8)])),
    (1, lambda rng, _: bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))])),
    (4, lambda rng, _: u32(rng.choice(INTERESTING))),
    (8, lambda rng, _: u64(rng.choice(LONG))),
    (4, lambda rng, _: _hostile(rng)),
    (8, _nudged),
    (0, lambda rng, _: rng.randbytes(rng.choice((1, 4, 8)))),
)
"""Of how many bytes of a header, and what takes their place."""
WAYS = len(OVERWRITES) + 2


def damage(rng: random.Random, way: int, header: bytearray, at: int) -> None:
    """Change a header in one of `WAYS`."""
    if way < len(OVERWRITES):
        n, made = OVERWRITES[way]
        header[at : at + n] = made(rng, bytes(header[at : at + n]))
    elif way == len(OVERWRITES):
        del header[at : at + rng.choice((1, 4, 8))]
    else:
        start, n = rng.randrange(len(header)), rng.randint(1, 64)
        header[at : at + n] = header[start : start + n]


def other_factors(rng: random.Random) -> bytes:
    """A well-formed array under the key, of any type, length and values."""
    kind = F32 if rng.random() < 0.6 else rng.choice((*SIZES, STRING))
    n = rng.choice((LAYERS, LAYERS, LAYERS, rng.randrange(2 * LAYERS), MAX_LAYERS, MAX_LAYERS + 1))
    if kind == STRING:
        return array(kind, n, b"".join(string(rng.randbytes(rng.randrange(9))) for _ in range(n)))
    if kind == F32:
        values = (floats([rng.choice((1.0, 0.5, 3.0))]) if rng.random() < 0.9 else _hostile(rng) for _ in range(n))
        return array(kind, n, b"".join(values))
    return array(kind, n, rng.randbytes(n * SIZES[kind]))


def spots(model: Model) -> tuple[list[tuple[int, int]], list[tuple[int, int]], list[tuple[int, int]]]:
    """Spans of a header: the factors, other keys of the layers and of RoPE, everything."""
    start, stop = model.span(KEY)
    value = start + 8 + len(KEY)
    related = [key for key, _ in model.pairs if key != KEY and re.search(r"rope|block_count|architecture", key)]
    return (
        [(start, stop), (value, value + 16), (value + 16, stop)],
        [model.span(key) for key in related],
        [(0, len(model.header()))],
    )


def mutants(models: Sequence[Model], seed: int, n: int, weights: Sequence[int] = (5, 2, 3)) -> Iterator[Case]:
    """``n`` files with damaged headers, the same ones for the same seed.

    Args:
        models: what to damage.
        seed: each seed gives other files.
        n: how many.
        weights: how often the factors, related keys and the whole header are hit.
    """
    for i in range(n):
        rng = random.Random(f"{seed}/{i}")
        model = rng.choice(models)
        hits = rng.choice((1, 1, 2, 4))
        if rng.random() < 0.3:  # behind the reader of the format, which stops most of what is damaged at random
            model = model.put(KEY, other_factors(rng))
            hits = rng.choice((0, 1))
        header = bytearray(model.header())
        for _ in range(hits):
            start, stop = rng.choice(rng.choices(spots(model), weights)[0])
            damage(rng, rng.randrange(WAYS), header, min(rng.randrange(start, max(stop, start + 1)), len(header) - 8))
        yield Case(DAMAGED, f"seed {seed}, number {i}", model.with_header(bytes(header)))


@dataclass(frozen=True)
class Outcome:
    """What a driver said of a file; ``signature`` tells crashes apart."""

    verdict: Literal["ok", "refused", "crash"]
    message: str
    signature: str = ""


_SIGNATURES = (
    r"check failed: .*",
    r"\S+\.(c|cpp|h):\d+: .*",  # GGML_ASSERT and GGML_ABORT
    r"\S+?:[\d:]+ runtime error: .*",
    r"what\(\): .*",
    r"SUMMARY: .*",
    r"AddressSanitizer: .*",
)


def signature(report: str) -> str:
    """What went wrong and where, without the numbers that differ between equal crashes."""
    if match := re.search(r"leaked in \d+ allocation", report):
        return match[0]
    for pattern in _SIGNATURES:
        if match := re.search(pattern, report):
            text = re.sub(r"\S*/", "", match[0])
            return re.sub(r"0x[0-9a-f]+|\d+", "N", text)
    return report.strip().splitlines()[-1]


def parse_output(output: str) -> dict[str, Outcome]:
    result = {}
    for block in re.split(r"^@file ", output, flags=re.M)[1:]:
        path, _, report = block.partition("\n")
        if "\n@died " in f"\n{report}":
            result[path] = Outcome("crash", report.strip(), signature(report))
        elif "\n@ok" in f"\n{report}":
            result[path] = Outcome("ok", "")
        else:
            match = re.search(r"^@refused (.*)$", report, re.M)
            result[path] = Outcome("refused", match[1] if match else "")
    return result


def complaint(case: Case, outcome: Outcome) -> str | None:
    """What is wrong with the outcome of a structured case; None if nothing."""
    if case.verdict not in ("any", outcome.verdict):
        return f"{case.kind}, {case.name}: {outcome.verdict} instead of {case.verdict}: {outcome.message[:300]}"
    missing = [word for word in case.words if word not in outcome.message]
    if missing:
        return f"{case.kind}, {case.name}: the message lacks {missing}: {outcome.message[:300]}"
    return None
