"""Blocks of ggml's tensor types: where their scales stand, those times a number, and the way back to the bit.

What a block stands for is linear in its scales (ggml-common.h), so a row times q is its scales times q, each rounded to
the nearest number that it can be. Back: a scale is what is nearest to the new one over q, plus a correction, which is
-1, 0 or 1 units in the last place but for numbers that are subnormal then.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lrope_gguf.errors import LropeError

Bits = NDArray[Any]
"""Of uint16 or uint32, as the numbers are of 16 or 32 bits."""
Floats = NDArray[np.float64]


class Number(NamedTuple):
    """A kind of floating-point number: its bytes, half a unit relative to a normal one, and to a subnormal one."""

    size: int
    relative: float
    absolute: float


F16, BF16, F32 = Number(2, 2.0**-11, 2.0**-25), Number(2, 2.0**-8, 2.0**-134), Number(4, 2.0**-24, 2.0**-150)


class Layout(NamedTuple):
    """A type's name, items and bytes of a block, the offsets of its scales, and what numbers they are.

    Without offsets, the scale is spread over the highest four bits of the block's last four 16-bit words.
    """

    name: str
    items: int
    size: int
    scales: tuple[int, ...]
    number: Number = F16


LAYOUTS = {
    **{0: Layout("F32", 1, 4, (0,), F32), 1: Layout("F16", 1, 2, (0,)), 30: Layout("BF16", 1, 2, (0,), BF16)},
    **{2: Layout("Q4_0", 32, 18, (0,)), 3: Layout("Q4_1", 32, 20, (0, 2)), 6: Layout("Q5_0", 32, 22, (0,))},
    **{7: Layout("Q5_1", 32, 24, (0, 2)), 8: Layout("Q8_0", 32, 34, (0,)), 10: Layout("Q2_K", 256, 84, (80, 82))},
    **{11: Layout("Q3_K", 256, 110, (108,)), 12: Layout("Q4_K", 256, 144, (0, 2))},
    **{13: Layout("Q5_K", 256, 176, (0, 2)), 14: Layout("Q6_K", 256, 210, (208,))},
    **{16: Layout("IQ2_XXS", 256, 66, (0,)), 17: Layout("IQ2_XS", 256, 74, (0,)), 22: Layout("IQ2_S", 256, 82, (0,))},
    **{18: Layout("IQ3_XXS", 256, 98, (0,)), 21: Layout("IQ3_S", 256, 110, (0,)), 20: Layout("IQ4_NL", 32, 18, (0,))},
    **{23: Layout("IQ4_XS", 256, 136, (0,)), 19: Layout("IQ1_S", 256, 50, (0,)), 29: Layout("IQ1_M", 256, 56, ())},
    **{34: Layout("TQ1_0", 256, 54, (52,)), 35: Layout("TQ2_0", 256, 66, (64,))},
    **{41: Layout("Q1_0", 128, 18, (0,)), 42: Layout("Q2_0", 64, 18, (0,))},
}
"""By ggml's number of the type; a type without a scale of its own, such as MXFP4, is not here."""

_WORDS = (0, 4, 8, 12)
_CODES = np.array([0, 1, -1, 2], np.int32)  # 2: the correction stands apart
_SLACK = 1 + 1e-6  # of bounds: a product in float64 is rounded once more


@dataclass
class Rounding:
    """What rounding has done to scales: the worst relative error, and how many are subnormal and so off by more."""

    worst: float = 0.0
    coarse: int = 0
    scales: int = 0


class Scales:
    """The scales of blocks: shape `(blocks, scales of a block)` as numbers' bits; `order` is the file's."""

    def __init__(self, layout: Layout, order: str) -> None:
        self.layout, self._type = layout, np.dtype(f"{order}u{layout.number.size}")
        self._native: Any = np.uint16 if layout.number.size == 2 else np.uint32

    @property
    def per_block(self) -> int:
        """Scales of a block."""
        return len(self.layout.scales) or 1

    def take(self, blocks: NDArray[np.uint8]) -> Bits:
        """The scales in blocks of shape `(blocks, bytes)`."""
        if not self.layout.scales:
            words = self._words(blocks)
            parts = [words[:, i] >> 12 << shift for i, shift in enumerate(_WORDS)]
            return np.array(np.bitwise_or.reduce(parts)[:, None])
        size = self.layout.number.size
        columns = [np.ascontiguousarray(blocks[:, at : at + size]).view(self._type) for at in self.layout.scales]
        return np.concatenate(columns, 1).astype(self._native)

    def put(self, blocks: NDArray[np.uint8], bits: Bits) -> None:
        """Replace them."""
        if not self.layout.scales:
            words = self._words(blocks) & 0xFFF
            for i, shift in enumerate(_WORDS):
                words[:, i] |= (bits[:, 0] >> shift & 15) << 12
            blocks[:, -8:] = words.astype(self._type).view(np.uint8)
        for i, at in enumerate(self.layout.scales):
            new = np.ascontiguousarray(bits[:, i : i + 1].astype(self._type))
            blocks[:, at : at + self.layout.number.size] = new.view(np.uint8)

    def _words(self, blocks: NDArray[np.uint8]) -> Bits:
        return np.ascontiguousarray(blocks[:, -8:]).view(self._type).astype(np.uint16)

    def values(self, bits: Bits) -> Floats:
        """What they are; exact."""
        if self.layout.number is F16:
            return bits.view(np.float16).astype(np.float64)
        if self.layout.number is BF16:
            bits = bits.astype(np.uint32) << 16
        return bits.view(np.float32).astype(np.float64)

    def nearest(self, values: Floats) -> Bits:
        """The bits of what is nearest to `values`."""
        with np.errstate(over="ignore", invalid="ignore"):
            if self.layout.number is F16:
                return values.astype(np.float16).view(np.uint16)
            bits = values.astype(np.float32).view(np.uint32)
        if self.layout.number is BF16:
            return ((bits + (0x7FFF + (bits >> 16 & 1)).astype(np.uint32)) >> 16).astype(np.uint16)
        return bits

    def scaled(self, old: Bits, q: Floats) -> Bits:
        """Scales times `q` of shape `(blocks, 1)`."""
        return self.nearest(self.values(old) * q)

    def checked(self, old: Bits, q: Floats, rounding: Rounding) -> tuple[Bits, NDArray[np.int32]]:
        """The same, and the corrections of the way back.

        Raises `LropeError` (without a file's name): a scale is not finite before, or not afterwards.
        """
        before = self.values(old)
        if not np.isfinite(before).all():
            raise LropeError("has a scale that is not a finite number; the file is damaged, get a new copy")
        exact = before * q
        new = self.nearest(exact)
        after = self.values(new)
        if not np.isfinite(after).all():
            raise LropeError(
                f"has a scale of {np.abs(before[~np.isfinite(after)]).max():g}, too large for its type after folding; "
                "give a lower query scale"
            )
        number = self.layout.number
        size = np.abs(exact)
        error = np.abs(after - exact)
        coarse = error > number.relative * _SLACK * size
        if coarse.any():
            if error[coarse].max() > number.absolute * _SLACK:  # not by this code
                raise LropeError("could not be scaled; please report this")
            rounding.coarse += int(np.count_nonzero(coarse))
            error[coarse] = 0
        size[size == 0] = 1
        error /= size
        rounding.worst = max(rounding.worst, float(error.max(initial=0.0)))
        rounding.scales += error.size
        return new, old.astype(np.int32) - self.nearest(after / q).astype(np.int32)

    def restored(self, new: Bits, q: Floats, corrections: NDArray[np.int32]) -> Bits:
        """The scales before: the inverse of `scaled`; anything where corrections are not its own."""
        guess: Bits = self.nearest(self.values(new) / q)
        guess += corrections.astype(self._native)
        return guess


class Packer:
    """Packs corrections into about a bit each: codes of two bits, then the others as planes of bytes, compressed."""

    def __init__(self) -> None:
        self._codes: list[NDArray[np.uint8]] = []
        self._far: list[NDArray[np.int32]] = []

    def add(self, corrections: NDArray[np.int32]) -> None:
        """Add the next ones."""
        flat = corrections.ravel()
        far = (flat < -1) | (flat > 1)
        self._codes.append(np.where(far, 3, flat % 3).astype(np.uint8))
        self._far.append(flat[far])

    def packed(self) -> bytes:
        """All of them."""
        codes, rest = np.concatenate(self._codes), np.concatenate(self._far)
        codes = np.pad(codes, (0, -len(codes) % 4)).reshape(-1, 4)
        packed = codes[:, 0] | codes[:, 1] << 2 | codes[:, 2] << 4 | codes[:, 3] << 6
        planes = (rest << 1 ^ rest >> 31).astype("<u4").view(np.uint8).reshape(-1, 4).T
        # nothing is repeated but runs, and so all that helps is done in little time
        packer = zlib.compressobj(6, zlib.DEFLATED, 15, 9, zlib.Z_RLE)
        return packer.compress(packed.tobytes() + planes.tobytes()) + packer.flush()


class Corrections:
    """What a `Packer` has packed, taken out piece by piece. Raises `ValueError`: it is not `n` corrections."""

    def __init__(self, data: bytes, n: int) -> None:
        length = -(-n // 4)
        try:
            reader = zlib.decompressobj()
            raw = reader.decompress(data, length + 4 * n + 1)
        except zlib.error:
            raw = b""
        self._packed = np.frombuffer(raw[:length], np.uint8)
        if len(self._packed) < length or len(raw) % 4 != length % 4 or not reader.eof:
            raise ValueError("corrections")
        planes = np.frombuffer(raw[length:], np.uint8).reshape(4, -1)
        rest = np.ascontiguousarray(planes.T).view("<u4")[:, 0]
        self._far, self._at = (rest >> 1).astype(np.int32) ^ -(rest & 1).astype(np.int32), 0

    def take(self, n: int) -> NDArray[np.int32]:
        """The next `n`."""
        first, self._at = self._at, self._at + n
        packed = self._packed[first // 4 : -(-self._at // 4)]
        codes = np.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], 1).ravel()[first % 4 :][:n]
        result: NDArray[np.int32] = _CODES[codes]
        far = codes == 3
        count = int(np.count_nonzero(far))
        if count > len(self._far):
            raise ValueError("corrections")
        result[far], self._far = self._far[:count], self._far[count:]
        return result
