"""Query scales folded into a model's own tensors, so that any runtime serves them, and taken out again to the bit.

Attention logits are linear in the queries, and these in the rows of `attn_q` and in its bias: head h's rows times q[h]
give its logits times q[h]. Where queries are normalized after the projection, the norm's weight takes the scales.
"""

from __future__ import annotations

import hashlib
import math
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lrope_gguf.blocks import LAYOUTS, Corrections, Floats, Layout, Packer, Rounding, Scales
from lrope_gguf.curve import Rows, head_rows
from lrope_gguf.errors import LropeError
from lrope_gguf.folded import Folded, Kept, damaged, folded_of
from lrope_gguf.gguf_file import GGUFFile, Tensor
from lrope_gguf.layout import BEFORE_KEY, Made
from lrope_gguf.model_info import ModelInfo
from lrope_gguf.rope_scaling import single

_PROGRAM = "lrope-gguf"
_CHUNK = 1 << 20
Found = Mapping[str, tuple[int, Tensor]]
_ORIGINAL = "get the original model again"
_RUNTIME = "leave the file as it is and let the patched llama.cpp scale its queries (write without --fold)"

# Architectures whose queries come from `attn_q`, from the first rows of `attn_qkv` or, under MLA, from `attn_q_b`, head
# after head, with nothing but `attn_q_norm` in which a factor is lost (llama.cpp 0c1e570, src/models and `build_qkv`).
_ARCHITECTURES = """
afmoe apertus arcee arctic baichuan bailingmoe bailingmoe2 bert bitnet bloom chameleon chatglm codeshell cohere2
cohere2moe command-r dbrx deci deepseek deepseek2 deepseek2-ocr dots1 dream ernie4_5 ernie4_5-moe eurobert exaone
exaone-moe exaone4 falcon falcon-h1 gemma gemma-embedding gemma2 gemma3 gemma3n gemma4 glm4 glm4moe gpt-oss gpt2
gptneox granite granite_swa granitehybrid granitemoe grok grovemoe hunyuan-dense hunyuan-moe hunyuan_vl hy_v3
internlm2 jais jais2 jamba jina-bert-v2 jina-bert-v3 laguna lfm2 lfm2moe llada llada-moe llama llama-embed maincoder
maple mellum mimo2 minicpm minicpm3 minimax-m2 mistral3 mistral4 modern-bert mpt muse-glimmer nanbeige nemotron
nemotron_h nemotron_h_moe neo-bert nomic-bert nomic-bert-moe olmo olmo2 olmoe openelm orion paddleocr pangu-embedded
phi2 phi3 phimoe plamo plamo2 plamo3 plm qwen qwen2 qwen2moe qwen2vl qwen3 qwen35 qwen35moe qwen3moe qwen3next
qwen3vl qwen3vlmoe refact rnd1 seed_oss smallthinker smollm3 stablelm starcoder starcoder2 step35 talkie xverse
"""
_KNOWN = frozenset(_ARCHITECTURES.split())
_NORMED = frozenset(("qwen3next", "qwen35", "qwen35moe"))
"""Those whose layers without `attn_q_norm` have no attention, but what they have is called `attn_qkv` as well."""


@dataclass(frozen=True)
class Wanted:
    """Scales to fold.

    Attributes:
        scales: of each layer one number a head, 1/16 to 16; none for a layer without attention.
        source: the curve file that they come from.
        replace: whether they may take the place of others that are folded already.
    """

    scales: Rows
    source: str
    replace: bool = False


@dataclass(frozen=True)
class Folding:
    """What folding or unfolding changes.

    Attributes:
        made: for each file of the model what is new in its tensors.
        record, before: the texts to store; empty where nothing is folded then.
        rounding: of the new scales.
        folded: what is folded then.
    """

    made: list[list[Made]]
    record: bytes = b""
    before: bytes = b""
    rounding: Rounding = field(default_factory=Rounding)
    folded: Folded | None = None


@dataclass(frozen=True)
class _Queries:
    """The rows of a tensor that make queries: `rows` of `row` bytes from `start` on, of `heads` equal parts."""

    file: int
    gguf: GGUFFile
    name: str
    kind: int
    layer: int
    heads: int
    start: int
    rows: int
    row: int

    @property
    def end(self) -> int:
        return self.start + self.rows * self.row

    @property
    def layout(self) -> Layout:
        return LAYOUTS[self.kind]

    @property
    def scales(self) -> Scales:
        return Scales(self.layout, self.gguf.order)

    @property
    def n_scales(self) -> int:
        return self.rows * self.row // self.layout.size * self.scales.per_block

    def factors(self, q: Sequence[float], first: int, end: int) -> Floats:
        """The scale of each block of the rows from `first` to `end`, shape `(blocks, 1)`."""
        of_rows = np.array(q[: self.heads])[np.arange(first, end) // (self.rows // self.heads)]
        return np.repeat(of_rows, self.row // self.layout.size)[:, None]

    def chunks(self) -> Iterator[tuple[int, int, bytes]]:
        """First row, row after the last one, and bytes, of as many rows at a time as memory should hold."""
        step = max(1, _CHUNK // self.row)
        for first in range(0, self.rows, step):
            end = min(self.rows, first + step)
            yield first, end, self.gguf.read(self.start + first * self.row, self.start + end * self.row)

    def blocks(self, data: bytes) -> NDArray[np.uint8]:
        return np.frombuffer(bytearray(data), np.uint8).reshape(-1, self.layout.size)

    def digest(self) -> str:
        """SHA-256 of the rows."""
        digest = hashlib.sha256()
        for _, _, data in self.chunks():
            digest.update(data)
        return digest.hexdigest()


@dataclass(frozen=True)
class _Change:
    """What becomes of a tensor's queries: the scales `old` are taken out with `packed`, `new` ones are folded.

    `before`: SHA-256 of the rows without scales, where it is known.
    """

    queries: _Queries
    old: Sequence[float] | None = None
    packed: bytes = b""
    new: Sequence[float] | None = None
    before: str | None = None

    def steps(self) -> Iterator[tuple[int, int, bytes]]:
        """Chunk by chunk as in `_Queries.chunks`, with the old scales taken out."""
        queries, scales = self.queries, self.queries.scales
        if self.old is None:
            yield from queries.chunks()
            return
        corrections = Corrections(self.packed, queries.n_scales)
        for first, end, data in queries.chunks():
            blocks = queries.blocks(data)
            bits = scales.take(blocks)
            back = corrections.take(bits.size).reshape(bits.shape)
            scales.put(blocks, scales.restored(bits, queries.factors(self.old, first, end), back))
            yield first, end, blocks.tobytes()

    def new_bytes(self) -> Iterator[bytes]:
        """The new bytes, chunk by chunk."""
        queries, scales = self.queries, self.queries.scales
        for first, end, data in self.steps():
            if self.new is None:
                yield data
                continue
            blocks = queries.blocks(data)
            scales.put(blocks, scales.scaled(scales.take(blocks), queries.factors(self.new, first, end)))
            yield blocks.tobytes()

    def checked(self, rounding: Rounding) -> tuple[str, str, bytes]:
        """SHA-256 of the rows without scales and as they become, and the packed corrections of the new scales.

        Every new block is compared with the old: its scales are the old ones times q within rounding, all else is as it
        was. Raises `LropeError` where that cannot be.
        """
        queries, scales = self.queries, self.queries.scales
        before, after, packer = hashlib.sha256(), hashlib.sha256(), Packer()
        for first, end, data in self.steps():
            before.update(data)
            if self.new is None:
                continue
            blocks = queries.blocks(data)
            try:
                new, corrections = scales.checked(scales.take(blocks), queries.factors(self.new, first, end), rounding)
            except LropeError as error:
                raise LropeError(f"{queries.gguf.path}: {queries.name} {error}") from None
            scales.put(blocks, new)
            packer.add(corrections)
            after.update(blocks.data)
        if self.new is None:
            return before.hexdigest(), before.hexdigest(), b""
        return before.hexdigest(), after.hexdigest(), packer.packed()


def fold(models: Sequence[GGUFFile], info: ModelInfo, wanted: Wanted) -> Folding:
    """Fold scales into a model, after taking out those that are folded and may be replaced.

    Args:
        models: all files of the model, the first one first.
        info: what the first one's header says.
        wanted: the scales.

    Raises:
        LropeError: the scales do not fit, or the model cannot take them; says why.
    """
    old = folded_of(models[0])
    if old is not None and not wanted.replace:
        raise LropeError(
            f"{info.path}: has query scales folded into it already (from {old.source}); take them out with lrope-gguf "
            "remove first, or give --replace"
        )
    scales, found = _fitting(info, models[0], wanted), _found(models)
    targets: dict[str, _Queries] = {}
    for layer, row in enumerate(scales):
        if any(q != 1 for q in row):
            targets |= _of_layer(models, info, found, layer, row)
    if not targets:
        raise LropeError(f"{wanted.source}: all its query scales are 1, so there is nothing to fold; give others")
    changes = {} if old is None else {change.queries.name: change for change in _undone(models, found, old)}
    for name, queries in targets.items():
        before = changes.get(name, _Change(queries))
        changes[name] = replace(before, queries=queries, new=scales[queries.layer])
    return _folding(models, changes.values(), Folded(_PROGRAM, Path(wanted.source).name, scales, ()))


def unfold(models: Sequence[GGUFFile], folded: Folded) -> Folding:
    """Take out what is folded. Raises `LropeError`: a tensor was changed since, or what is needed is damaged."""
    return _folding(models, _undone(models, _found(models), folded), None)


def _undone(models: Sequence[GGUFFile], found: Found, folded: Folded) -> list[_Change]:
    """The changes that take out what is folded; none for tensors that are as before, after an interrupted write."""
    packed, changes = folded.before(models[0]), []
    for item in folded.tensors:
        queries = _place(models, found, item)
        state = queries.digest()
        if state not in (item.before, item.after):
            raise _changed(queries.gguf, item.name)
        old = folded.scales[item.layer] if state == item.after else None
        changes.append(_Change(queries, old, packed[item.name], before=item.before))
    return changes


def _folding(models: Sequence[GGUFFile], changes: Iterable[_Change], folded: Folded | None) -> Folding:
    made: list[list[Made]] = [[] for _ in models]
    rounding, tensors, packed = Rounding(), [], []
    for change in changes:
        queries = change.queries
        try:
            before, after, corrections = change.checked(rounding)
        except ValueError:
            before, after, corrections = "", "", b""
        if change.before not in (None, before):
            raise damaged(models[0], BEFORE_KEY)
        if change.old is not None or change.new is not None:
            made[queries.file].append(Made(queries.start, queries.end, change.new_bytes, after, queries.name))
        if change.new is not None:
            counts = (queries.kind, queries.layer, queries.heads, queries.rows, queries.row)
            tensors.append(Kept(queries.name, *counts, before, after, len(corrections)))
            packed.append(corrections)
    for stretches in made:
        stretches.sort(key=lambda new: new.start)
        if any(a.end > b.start for a, b in pairwise(stretches)):
            raise LropeError(f"{models[0].path}: has folded tensors that overlap; {_ORIGINAL}")
    if folded is None:
        return Folding(made)
    folded = replace(folded, tensors=tuple(tensors))
    return Folding(made, folded.dumps(), b64encode(b"".join(packed)), rounding, folded)


def _fitting(info: ModelInfo, gguf: GGUFFile, wanted: Wanted) -> Rows:
    """The scales as float32, checked, for the layers that they have."""
    architecture = str(info.architecture)
    if architecture not in _KNOWN:
        raise LropeError(
            f"{info.path}: how {architecture!r} makes its queries is not known here, so nothing can be folded; "
            f"{_RUNTIME}"
        )
    if (clamp := gguf.scalar(f"{architecture}.attention.clamp_kqv")) and clamp > 0:
        raise LropeError(
            f"{info.path}: limits its queries ({architecture}.attention.clamp_kqv), so scales cannot be folded; "
            f"{_RUNTIME}"
        )
    try:
        scales = info.shaped_rows("query_scales", head_rows(wanted.scales, "query_scales"))
    except LropeError as error:
        text = str(error)
        raise LropeError(text if text.startswith(f"{info.path}: ") else f"{wanted.source}: {text}") from None
    return tuple(tuple(map(single, row)) for row in scales)


def _found(models: Sequence[GGUFFile]) -> Found:
    """The tensors that make queries, in all files: the file's number, and the tensor."""
    found: dict[str, tuple[int, Tensor]] = {}
    for number, gguf in enumerate(models):
        if gguf.overlaps or found.keys() & gguf.queries.keys():
            raise LropeError(f"{gguf.path}: holds a tensor twice, or over another; the file is damaged, get a new copy")
        found |= {name: (number, tensor) for name, tensor in gguf.queries.items()}
    return found


def _of_layer(
    models: Sequence[GGUFFile], info: ModelInfo, found: Found, layer: int, row: Sequence[float]
) -> dict[str, _Queries]:
    """What the scales of a layer are folded into, by name. Raises `LropeError`: nothing can take them; says why."""
    here = {name.split(".", 2)[2]: name for name in found if name.startswith(f"blk.{layer}.")}
    path, n_head = info.path, len(row)
    weight = next((name for name in ("attn_q_b.weight", "attn_q.weight", "attn_qkv.weight") if name in here), None)
    normed = "attn_q_norm.weight" in here
    n_kv = (info.n_head_kv or ())[layer]
    if weight is None or not n_kv or (info.architecture in _NORMED and not normed):
        raise LropeError(
            f"{path}: layer {layer} has no attention that scales could be folded into; give 1 for its heads"
        )
    n_rows = math.prod(found[here[weight]][1].dims[1:])
    size, keys, values = _sizes(models[0], info, n_head, n_kv)
    fused = weight == "attn_qkv.weight"
    heads, n = n_head, n_rows
    if normed:
        dims = found[here["attn_q_norm.weight"]][1].dims
        n = math.prod(dims)
        of_heads = math.prod(dims[1:]) == n_head or n == n_head * size or (n == n_rows and not fused)
        if n_head == 1 or not of_heads:
            if n != size and n * n_head not in (n_rows, n_rows // 2):  # half of them where gates lie between
                raise _unknown(path, here["attn_q_norm.weight"])
            if len({*row}) > 1:
                raise LropeError(
                    f"{path}: layer {layer} normalizes its queries after attn_q and has one weight for all heads, so "
                    f"scales that differ between its heads cannot be folded; {_RUNTIME}"
                )
            heads = 1
        names = ["attn_q_norm.weight", "attn_q_norm.bias"]
    else:
        names = [weight, "attn_q.bias", "attn_qkv.bias"]
        if fused:
            n = n_head * size
        if n % n_head or (fused and n + keys + values != n_rows):
            raise _unknown(path, here[weight])
    places = (here[name] for name in names if name in here)
    return {name: _queries(models, found, name, layer, heads, None if normed else n) for name in places}


def _sizes(gguf: GGUFFile, info: ModelInfo, n_head: int, n_kv: int) -> tuple[int, int, int]:
    """Rows of a head's queries, of all keys and of all values of a layer, as the header says them."""
    of = f"{info.architecture}.attention"
    embedding = gguf.integer(f"{info.architecture}.embedding_length") or 0
    key = gguf.integer(f"{of}.key_length") or embedding // n_head
    value = gguf.integer(f"{of}.value_length") or embedding // n_head
    return key, n_kv * key, n_kv * value


def _queries(models: Sequence[GGUFFile], found: Found, name: str, layer: int, heads: int, n: int | None) -> _Queries:
    """The first `n` rows of a tensor, or all; of one with a single row, its items."""
    number, tensor = found[name]
    gguf, layout = models[number], LAYOUTS.get(tensor.kind)
    if layout is None:
        raise LropeError(
            f"{gguf.path}: {name} has a type without 16-bit scales (number {tensor.kind} of ggml), so nothing can be "
            f"folded; {_RUNTIME}"
        )
    row, rows = _shape(tensor, layout)
    n = rows if n is None else n
    if not row or not 0 < n <= rows or n % heads:
        raise _unknown(gguf.path, name)
    return _Queries(number, gguf, name, tensor.kind, layer, heads, gguf.data_start + tensor.offset, n, row)


def _shape(tensor: Tensor, layout: Layout) -> tuple[int, int]:
    """Bytes of a row, 0 where it is not whole blocks, and number of rows; an item is a row where there is but one."""
    items, *rows = tensor.dims if len(tensor.dims) > 1 else (1, *tensor.dims)
    return 0 if items % layout.items else items // layout.items * layout.size, math.prod(rows)


def _place(models: Sequence[GGUFFile], found: Found, item: Kept) -> _Queries:
    """Where rows that were folded stand. Raises `LropeError`: the tensor is not as it was."""
    number, tensor = found.get(item.name, (0, None))
    if tensor is None:
        raise LropeError(f"{models[0].path}: has lost {item.name}, which holds folded query scales; {_ORIGINAL}")
    layout, gguf = LAYOUTS.get(tensor.kind), models[number]
    if layout is None or tensor.kind != item.kind:
        raise _changed(gguf, item.name)
    row, rows = _shape(tensor, layout)
    if row != item.row or rows < item.rows:
        raise _changed(gguf, item.name)
    start = gguf.data_start + tensor.offset
    return _Queries(number, gguf, item.name, item.kind, item.layer, item.heads, start, item.rows, item.row)


def _changed(gguf: GGUFFile, name: str) -> LropeError:
    return LropeError(
        f"{gguf.path}: {name} was changed after query scales were folded into it, so they cannot be taken out; "
        f"{_ORIGINAL}"
    )


def _unknown(path: Path, name: str) -> LropeError:
    return LropeError(f"{path}: {name} has another shape than is known here, so nothing can be folded; {_RUNTIME}")
