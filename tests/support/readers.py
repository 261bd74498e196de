"""Curve documents and lists of factors, and what becomes of them in each of the two programs that read them.

`lrope-gguf write` (lrope_gguf/curve.py, commands/options.py) and `--rope-layer-factors` of llama.cpp's tools
(patches/src/common/rope-layer.cpp) must judge alike: refuse, or take with the same float32 factors. A new line in a
table here is tried on both by tests/test_readers.py.
"""

from __future__ import annotations

import json
from typing import Any, Final

from lrope_gguf.curve import Curve

N_LAYER = 6
FACTORS = (1.0, 1.3, 0.8, 2.5, 1.07, 3.1)
ONES = (1.0,) * N_LAYER
POINTS = [[0, 1], [0.5, 2], [1, 1.5]]
CURVED = tuple(round(s, 9) for s in Curve(((0, 1), (0.5, 2), (1, 1.5))).factor_list(N_LAYER))
SHORT = tuple(round(s, 9) for s in Curve(((0, 1), (0.5, 2), (1, 1.5))).factor_list(N_LAYER - 1))

REFUSED: Final = "refused"
CURVE: Final = "curve"
"""Taken by `write`, which evaluates curves; the tools, which do not, say that it is `write` that does."""

Verdict = tuple[float, ...] | str
"""The factors, or one of the words above."""
Table = dict[str, tuple[str | bytes, Verdict]]


def document(**fields: Any) -> str:
    """A curve file; a field that is ... is left out."""
    whole = {"format": "lrope-curve", "version": 1, "layer_factors": FACTORS} | fields
    return json.dumps({key: value for key, value in whole.items() if value is not ...})


def with_text(number: str) -> str:
    """A curve file with `number` as it stands for the fourth of six factors."""
    return document(layer_factors=[1, 1, 1, 7, 1, 1]).replace("7", number)


def curved(points: Any = POINTS, factors: Any = CURVED, **fields: Any) -> str:
    """A curve file with both points and factors."""
    return document(control_points=points, layer_factors=factors, **fields)


def _nested(depth: int) -> Any:
    return [] if depth == 1 else [_nested(depth - 1)]


DOCUMENTS: Table = {
    # what is taken
    "list": (document(), FACTORS),
    "integers": (document(layer_factors=[1, 2, 1, 1, 1, 1]), (1, 2, 1, 1, 1, 1)),
    "exponent": (with_text("25E-1"), (1, 1, 1, 2.5, 1, 1)),
    "many digits": (with_text("1.3000000000000000444089209850062616169452667236328125"), (1, 1, 1, 1.3, 1, 1)),
    "half a float32 step": (with_text("1.000000059604644775390625"), ONES),
    "a bit more": (with_text("1.00000005960464499743523"), (1, 1, 1, 1 + 2**-23, 1, 1)),
    "largest": (with_text("1024"), (1, 1, 1, 1024, 1, 1)),
    "smallest": (with_text("0.0009765625"), (1, 1, 1, 2**-10, 1, 1)),
    "byte order mark": (b"\xef\xbb\xbf" + document().encode(), FACTORS),
    "other white space": (document().replace(" ", "\r\n\t"), FACTORS),
    "own model": (document(architecture="llama", block_count=N_LAYER), FACTORS),
    "nothing said of the model": (document(architecture=None, block_count=None), FACTORS),
    "no bounds, no points": (document(bounds=None, control_points=None), FACTORS),
    "version 1.0": (document(version=1.0), FACTORS),
    "unknown keys": (document(new={"a": [1, None, True]}, provenance="so"), FACTORS),
    "escapes": (document(provenance=0).replace(": 0", r': "\u0000\ud83d\ude00\/é"'), FACTORS),
    "nested in 32 levels": (document(provenance=_nested(31)), FACTORS),
    "1 MiB": (document().ljust(1 << 20), FACTORS),
    "curve and factors": (curved(), CURVED),
    "nearly the curve's": (curved(factors=(*CURVED[:-1], 1.500009)), (*CURVED[:-1], 1.500009)),
    "bounds": (curved(bounds=[1, 2]), CURVED),
    # curves without factors for this model
    "curve": (curved(factors=...), CURVE),
    "curve, null factors": (curved(factors=None), CURVE),
    "curve, factors of another model": (curved(factors=SHORT), CURVE),
    # what is no document
    "empty": ("", REFUSED),
    "cut": (document()[:-1], REFUSED),
    "a list alone": ("[1, 1, 1, 1, 1, 1]", REFUSED),
    "more after it": (document() + "{}", REFUSED),
    "NUL after it": (document() + "\0", REFUSED),
    "comma at the end": (document()[:-1] + ",}", REFUSED),
    "comment": (document() + "// so", REFUSED),
    "two byte order marks": (b"\xef\xbb\xbf" * 2 + document().encode(), REFUSED),
    "UTF-16": (document().encode("utf-16"), REFUSED),
    "Latin 1": (document(provenance=0).replace(": 0", ': "é"').encode("latin-1"), REFUSED),
    "half a surrogate pair": (document(provenance=0).replace(": 0", r': "\ud83d"'), REFUSED),
    "the other half, as a key": (document(a=0).replace('"a"', r'"\uDC00"'), REFUSED),
    "new line in a string": (document(provenance=0).replace(": 0", ': "a\nb"'), REFUSED),
    "a key twice": (document()[:-1] + ', "version": 1}', REFUSED),
    "a key twice, escaped": (document()[:-1] + r', "\u0076ersion": 1}', REFUSED),
    "a key twice, further in": (document(provenance=0).replace(": 0", ': [{"a": 1, "a": 1}]'), REFUSED),
    "nested in 33 levels": (document(provenance=_nested(32)), REFUSED),
    "70,000 lists": (document(provenance=[[]] * 70_000), REFUSED),
    "above 1 MiB": (document().ljust((1 << 20) + 1), REFUSED),
    # numbers
    ".5": (with_text(".5"), REFUSED),
    "2.": (with_text("2."), REFUSED),
    "+1": (with_text("+1"), REFUSED),
    "01": (with_text("01"), REFUSED),
    "1_0": (with_text("1_0"), REFUSED),
    "hexadecimal": (with_text("0x1"), REFUSED),
    "Arabic digit": (with_text("١"), REFUSED),
    "decimal comma": (with_text("1,5"), REFUSED),
    "NaN": (with_text("NaN"), REFUSED),
    "Infinity": (with_text("Infinity"), REFUSED),
    "1e999": (with_text("1e999"), REFUSED),
    "1e39": (with_text("1e39"), REFUSED),
    "1e-50": (with_text("1e-50"), REFUSED),
    "1e-400": (with_text("1e-400"), REFUSED),
    "above 1024": (with_text("1024.1"), REFUSED),
    "below 1/1024": (with_text("0.0009"), REFUSED),
    "zero": (with_text("0"), REFUSED),
    "negative": (with_text("-1"), REFUSED),
    "true": (with_text("true"), REFUSED),
    "text": (with_text('"1"'), REFUSED),
    "null": (with_text("null"), REFUSED),
    "list in it": (with_text("[1]"), REFUSED),
    "too large elsewhere": (document(provenance=0).replace(": 0", ": 1e999"), REFUSED),
    "400 digits elsewhere": (document(provenance=10**400), REFUSED),
    "5,000 digits elsewhere": (document(provenance=0).replace(": 0", ": " + "9" * 5000), REFUSED),
    # fields
    "no format": (document(format=...), REFUSED),
    "other format": (document(format="curve"), REFUSED),
    "no version": (document(version=...), REFUSED),
    "version 2": (document(version=2), REFUSED),
    "version true": (document(version=True), REFUSED),
    "version '1'": (document(version="1"), REFUSED),
    "version null": (document(version=None), REFUSED),
    "neither": (document(layer_factors=...), REFUSED),
    "both null": (document(layer_factors=None, control_points=None), REFUSED),
    "no factors": (document(layer_factors=[]), REFUSED),
    "factors of an object": (document(layer_factors={"a": 1}), REFUSED),
    "factors of a string": (document(layer_factors="1"), REFUSED),
    "a number of factors": (document(layer_factors=1), REFUSED),
    "five factors": (document(layer_factors=FACTORS[:5]), REFUSED),
    "seven factors": (document(layer_factors=(*FACTORS, 1)), REFUSED),
    "other architecture": (document(architecture="gemma3"), REFUSED),
    "architecture 3": (document(architecture=3), REFUSED),
    "block_count 7": (document(block_count=7), REFUSED),
    "block_count 6.0": (document(block_count=6.0), REFUSED),
    "block_count true": (document(block_count=True), REFUSED),
    "block_count '6'": (document(block_count="6"), REFUSED),
    "block_count 0": (document(block_count=0), REFUSED),
    "bounds reversed": (document(bounds=[2, 1]), REFUSED),
    "one bound": (document(bounds=[1]), REFUSED),
    "three bounds": (document(bounds=[1, 2, 3]), REFUSED),
    "bound true": (document(bounds=[True, 2]), REFUSED),
    "bound zero": (document(bounds=[0, 2]), REFUSED),
    "bounds of an object": (document(bounds={"a": 1, "b": 2}), REFUSED),
    # points beside factors
    "contradiction": (curved(factors=FACTORS), REFUSED),
    "contradiction by little": (curved(factors=(*CURVED[:-1], 1.500011)), REFUSED),
    "points out of bounds": (curved(bounds=[0.5, 1.9]), REFUSED),
    "points out of the usual bounds": (curved([[0, 5], [1, 5]], [5] * N_LAYER), REFUSED),
    "points of three values": (curved([[0, 1, 1], [1, 1, 1]], ONES), REFUSED),
    "points of a number": (curved([0, 1], ONES), REFUSED),
    "points of an object": (curved({"a": [0, 1], "b": [1, 1]}, ONES), REFUSED),
    "points of text": (curved([["0", "1"], ["1", "1"]], ONES), REFUSED),
    "points of true": (curved([[0, True], [True, True]], ONES), REFUSED),
    "one point": (curved([[0, 1]], ONES), REFUSED),
    "65 points": (curved([[i / 64, 1] for i in range(65)], ONES), REFUSED),
    "points backwards": (curved([[0, 1], [0.6, 1], [0.4, 1], [1, 1]], ONES), REFUSED),
    "points begin late": (curved([[0.1, 1], [1, 1]], ONES), REFUSED),
    "points end early": (curved([[0, 1], [0.9, 1]], ONES), REFUSED),
}

LISTS: Table = {
    "list": ("1,1.3,0.8,2.5,1.07,3.1", FACTORS),
    "blanks": (" 1, 1.3 ,0.8,2.5,1.07,3.1 ", FACTORS),
    "exponents": ("1e0,13E-1,0.8e+0,2.5,1.07,3.1", FACTORS),
    "many digits": ("1,1,1,1.3000000000000000444089209850062616169452667236328125,1,1", (1, 1, 1, 1.3, 1, 1)),
    **{
        number: (f"1,1,1,{number},1,1", REFUSED)
        for number in (
            *(".5", "2.", "+1", "01", "1_0", "1_000.5", "0x1", "1e", "1e1.0", "--1", "1 1", "", " ", "\t1", "\n1"),
            *("nan", "NaN", "inf", "Infinity", "true", "null", "[1]", '"1"', "1f", "1e400", "0", "-1", "1e-400"),
            *("١", "１", "½"),
        )
    },
    "too few": ("1,1.2", REFUSED),
    "too many": ("1,1,1,1,1,1,1", REFUSED),
    "decimal commas": ("1,05,1,1,0,98,1,1", REFUSED),
    "decimal commas that look like numbers": ("1,5,1,3,1,2,1,1,1,4,1,1", REFUSED),
    "semicolons": ("1;1;1;1;1;1", REFUSED),
    "comma at the end": ("1,1,1,1,1,1,", REFUSED),
    "comma at the beginning": (",1,1,1,1,1,1", REFUSED),
    "a blank": (" ", REFUSED),
    "brackets": ("[1,1,1,1,1,1]", REFUSED),
    "no file": ("missing.json", REFUSED),
}

# for a model of as many layers, of which the last is a multi-token-prediction head
_FIVE = (*FACTORS[:5], 1.0)
HEAD_DOCUMENTS: Table = {
    "five": (document(layer_factors=FACTORS[:5], block_count=N_LAYER), _FIVE),
    "six": (document(layer_factors=_FIVE), _FIVE),
    "six, and not 1 for the head": (document(layer_factors=FACTORS), REFUSED),
    "six, and nearly 1 for the head": (document(layer_factors=(*FACTORS[:5], 1 + 1e-9)), REFUSED),
    "four": (document(layer_factors=FACTORS[:4]), REFUSED),
    "block_count 5": (document(layer_factors=FACTORS[:5], block_count=5), REFUSED),
    "curve and five": (curved(factors=SHORT), (*SHORT, 1.0)),
    "curve and six": (curved(), CURVE),
    "curve": (curved(factors=...), CURVE),
}
HEAD_LISTS: Table = {
    "five": ("1,1.3,0.8,2.5,1.07", _FIVE),
    "six": ("1,1.3,0.8,2.5,1.07,1", _FIVE),
    "six, and not 1 for the head": ("1,1.3,0.8,2.5,1.07,3.1", REFUSED),
    "four": ("1,1,1,1", REFUSED),
    "seven": ("1,1,1,1,1,1,1", REFUSED),
}
