"""What `write`, `show` and `remove` say, each message once: the files in transcripts/, replayed in a folder of models.

A line `$ ...` is a command; what follows is its standard output, then its standard error after `! `, with its exit
status in front where that is not 0, and without the usage before an error of the command line. `| grep PATTERN` after a
command keeps lines of its output.
`python tests/test_transcripts.py NAME` writes a transcript anew from its commands.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.gguf_fixtures import header, write_model

from lrope_gguf import CurveFile, Scaling, files, metadata, read_model, write_factors
from lrope_gguf.cli import main
from lrope_gguf.rope_scaling import RopeScaling

TRANSCRIPTS = Path(__file__).parent / "transcripts"
POINTS = ((0.0, 1.0), (0.3, 1.4), (1.0, 1.1))
KEY = "llama.rope.scaling.layer_factors"


def model(name: str, architecture: str = "llama", layers: int | None = 4, tensors: int = 3, **keys: Any) -> Path:
    """A model with more keys, `__` for dots."""
    given = {key.replace("__", "."): value for key, value in keys.items()}
    return write_model(Path(name), architecture=architecture, block_count=layers, tensors=tensors, keys=given)


def prepare() -> None:
    """The models and curves that the transcripts name, in the current folder."""
    model("m.gguf")
    model("gemma.gguf", "gemma3", 7, gemma3__attention__sliding_window=128)
    model("window.gguf", "brand-new", brand_new__x=1, **{"brand-new.attention.sliding_window": 128})
    model(
        "windows.gguf",
        "gemma3",
        gemma3__attention__sliding_window=128,
        **{"gemma3.attention.sliding_window_pattern": [True] * 4},
    )
    model("lfm2.gguf", "lfm2", lfm2__attention__sliding_window=128)
    model("norope.gguf", "gpt2")
    model("lora.gguf", layers=None, general__type="adapter")
    model("vocabulary.gguf", layers=None, tensors=0)
    model("head.gguf", llama__nextn_predict_layers=4)
    model("mtp.gguf", llama__nextn_predict_layers=1)
    model("yarn.gguf", llama__rope__scaling__type="yarn", llama__rope__scaling__factor=2.0)
    model("longrope.gguf", llama__rope__scaling__type="longrope")
    model("sections.gguf", llama__rope__dimension_sections=[1, 2, 3, 4])
    model("magnitude.gguf", llama__rope__scaling__yarn_log_multiplier=0.1)
    model("array.gguf", llama__rope__scaling__type=[1, 2])
    model("damaged.gguf", lrope__original="{}")
    for number, values in enumerate(([1.0, 1.1], [1, 2, 3, 4], [1.0, float("inf"), 1.0, 1.0])):
        model(f"broken{number}.gguf", **{KEY: values})
    for number in (1, 2):
        model(f"split-0000{number}-of-00002.gguf", tensors=0, split__no=number - 1, split__count=2)
    Path("empty.gguf").write_bytes(header(b"", 0))
    Path("short.gguf").write_bytes(Path("m.gguf").read_bytes()[:-200])
    Path("folder").mkdir()
    curve = CurveFile(POINTS, architecture="llama", block_count=4, provenance={"task": "kv", "seed": 7})
    curve.save("best.json")
    CurveFile(POINTS, architecture="qwen2").save("qwen.json")
    CurveFile(POINTS, block_count=6).save("six.json")
    CurveFile(layer_factors=(1, 1, 1)).save("three.json")
    Path("nan.json").write_text(Path("best.json").read_text().replace("1.4", "NaN"))
    found = {"rope": RopeScaling("yarn", freq_scale=0.25, orig_ctx=512).json()}
    options = {"config": {"llama_options": {"cache_type_k": "q8_0"}}}
    CurveFile(layer_factors=(1, 1.2, 1.1, 1), provenance=found | options).save("yarn.json")
    for name, rope in (
        ("plain", RopeScaling(orig_ctx=512)),
        ("dynamic", RopeScaling("dynamic-yarn", orig_ctx=512, factor=4.0)),
    ):
        CurveFile(layer_factors=(1, 1.2, 1.1, 1), provenance={"rope": rope.json()}).save(f"{name}.json")
    counts = {f"llama.attention.{name}": n for name, n in (("head_count", 4), ("head_count_kv", [2, 1, 0, 2]))}
    model("heads.gguf", **counts)
    model("mrope.gguf", **counts, llama__rope__dimension_sections=[1, 2, 3, 4])
    model("mla.gguf", **counts, llama__attention__kv_lora_rank=512)
    model("headless.gguf", "gpt2", gpt2__attention__head_count=4)
    model("broken3.gguf", **counts, llama__attention__query_scales=[1.0] * 15)
    model("broken4.gguf", **counts, llama__attention__query_scales=[1.0] * 15 + [17.0])
    queries = ((0.75, 1, 1.25, 1.5), (1, 1, 1, 1), (1, 1, 1, 1), (0.7, 1, 1, 1.3))
    CurveFile(query_scales=queries).save("queries.json")
    CurveFile(query_scales=queries, head_factors=((1, 1.5), (1.25,), (), (0.9, 1))).save("heads.json")
    CurveFile(POINTS, query_scales=(*queries[:3], (1, 1, 1))).save("row.json")
    CurveFile(head_factors=((1, 1, 1, 2),) * 4).save("four.json")
    for name, value in (("scales.json", "17"), ("list.json", "[1]"), ("zero.json", "0")):
        Path(name).write_text(Path("queries.json").read_text().replace("1.25", value))
    write_factors(model("disagrees.gguf"), (1, 1.25, 0.75, 1))
    data = Path("disagrees.gguf").read_bytes()
    Path("disagrees.gguf").write_bytes(data.replace(np.float32(1.25).tobytes(), np.float32(1.5).tobytes()))
    Path("unreadable.gguf").write_bytes(data.replace(b'{"format"', b'{"former"'))
    write_factors(model("scaled.gguf"), (1, 1.25, 0.75, 1), scaling=Scaling("dynamic-yarn", 4))
    assert read_model("scaled.gguf").rope.scaling == "dynamic-yarn"


class Output(io.StringIO):
    encoding = "utf-8"


def contents() -> dict[str, bytes | None]:
    """All files of the current folder, and what they hold."""
    return {path.name: path.read_bytes() if path.is_file() else None for path in Path().iterdir()}


def replay(commands: list[str]) -> Iterator[str]:
    """The lines of a transcript with these commands and comments."""
    for line in commands:
        if line.startswith("#"):
            yield from ("", line, "")
            continue
        yield line
        command, _, kept = line[2:].partition(" | grep ")
        program, *words = shlex.split(command)
        if program == "cat":
            yield from Path(words[0]).read_text().splitlines()
            continue
        if program == "ln":
            os.link(*words)
            continue
        with redirect_stdout(Output()) as out, redirect_stderr(Output()) as err:
            before = contents()
            status = main(words)
            assert contents() == before or not (status or "--dry-run" in words), line
        yield from (text for text in out.getvalue().splitlines() if re.search(kept, text))
        errors = err.getvalue().splitlines()
        assert errors or not status, line
        yield from (f"{status or ''}! {text}" for text in errors[-1 if status == 2 else 0 :])


def transcript(name: str, patch: pytest.MonkeyPatch, folder: Path) -> tuple[list[str], list[str]]:
    """A transcript as it stands in its file, and as it is now."""
    patch.chdir(folder)
    patch.setattr(metadata, "can_share_blocks", lambda *_: False)  # as on most file systems
    patch.setattr(files, "_clone", lambda *_: False)
    prepare()
    lines = (TRANSCRIPTS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    found = "\n".join(replay([line for line in lines if line.startswith(("$ ", "# "))]))
    return lines, found.replace(str(folder), "/here").strip("\n").splitlines()


@pytest.mark.parametrize("name", ["write", "show", "remove"])
def test_transcript(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wanted, found = transcript(name, monkeypatch, tmp_path)
    assert found == wanted


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as place:
        lines = transcript(sys.argv[1], patch, Path(place).resolve())[1]
        os.chdir("/")
    (TRANSCRIPTS / f"{sys.argv[1]}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
