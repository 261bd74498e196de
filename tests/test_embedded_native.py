"""The true main job, end to end on the embedded model: `lrope-gguf demo`, then quantize, split and merge."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from support.llama_direct import Context
from support.rope_reference import Config, Reference, Rope, rms_error

from lrope_gguf import read_factors
from lrope_gguf.curve import CurveFile
from lrope_gguf.native import tool_path
from lrope_search.demo.model import embedded_model
from lrope_search.evaluation.evaluator import TeacherForcedEvaluator
from lrope_search.evaluation.model import Model
from lrope_search.tasks import KeyValueTask
from lrope_search.tasks.vocabulary import word_context, word_question

pytestmark = pytest.mark.native

TRAINED, LONG = 48, 120  # pairs
N_LAYER = 4
BASE = (1.0,) * N_LAYER
N_UNSEEN = 8
UNSEEN = 99  # a seed that the search does not have


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `lrope-gguf demo`, whose search all tests share; ``said.txt`` in it is what it said."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "lrope_gguf", "demo", "--dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder / "said.txt").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    return folder / "lrope-kv.gguf"


@pytest.fixture(scope="module")
def written(folder: Path) -> Path:
    return folder / "lrope-kv-lrope.gguf"


def test_the_demo_shows_a_gain_over_base_and_uniform_interpolation(folder: Path, base: Path, written: Path) -> None:
    said, curve = (folder / "said.txt").read_text(), CurveFile.load(folder / "lrope-kv.json")
    found = re.search(r"^gain ([\d.]+) points \[([\d.]+), .*; ([\d.]+) points \[([\d.]+), .* above it", said, re.M)
    assert found is not None, said
    assert all(float(number) > 5.0 for number in found.groups())
    over_http = {name: int(n) for name, n in re.findall(r"^(base|written) .* (\d+)/240$", said, re.M)}
    assert over_http["written"] > over_http["base"] + 24
    assert read_factors(written) == pytest.approx(curve.factors_for(4))
    assert curve.provenance["results"]["recommended"]
    assert read_factors(base) is None
    assert (folder / "lrope-kv.study" / "report.html").is_file()
    assert (folder / "lrope-kv.png").is_file()


def accuracy(path: Path, sides: Sequence[Sequence[float]], n: int = N_UNSEEN) -> list[float]:
    """Accuracy of each side on contexts that the search never saw."""
    with Model(path, n_threads=1) as model:
        task = KeyValueTask(LONG, probes=40, identifiers="word", seed=UNSEEN)
        evaluator = TeacherForcedEvaluator(model, task)
        return [float(np.mean([evaluator.evaluate(tuple(s), "test", i).accuracy for i in range(n)])) for s in sides]


def file_factors(path: Path) -> tuple[float, ...]:
    with Model(path) as model:
        model.reserve(64)
        return model.get_factors()


def weights(path: Path) -> dict[str, NDArray[np.float32]]:
    return {t.name: np.array(t.data).astype(np.float32) for t in gguf.GGUFReader(path).tensors}


def prompt(n_pairs: int) -> list[int]:
    """Tokens of a context and a question."""
    context = KeyValueTask(n_pairs, probes=2, identifiers="word").context("search", 0)
    with Model(embedded_model()) as model:
        return [int(token) for token in model.tokenize_prompt(context.prefix + context.probes[0].question)]


@pytest.mark.parametrize("factors", [BASE, (0.75, 1.25, 2.25, 3.3)], ids=["base", "factors"])
def test_computes_what_the_reference_does(base: Path, folder: Path, factors: tuple[float, ...]) -> None:
    exact = folder / "F32.gguf"
    subprocess.run([tool_path("llama-quantize"), base, exact, "F32", "1"], check=True, capture_output=True)
    config = Config(643, 96, 4, 2, 24, 128, (Rope(24),) * N_LAYER, (None,) * N_LAYER)
    tokens = prompt(LONG)
    wanted = Reference(config, weights(base), factors).decode(tokens)
    # ggml rounds what it multiplies with float16 weights to float16
    for path, error in ((exact, 1e-5), (base, 2e-3)):
        with Context(path, 512) as context:
            assert context.set_factors(list(factors)) == 0
            assert rms_error(context.decode(tokens), wanted) < error


def test_one_word_is_one_token(base: Path) -> None:
    text = word_context([("badi", "bab"), ("mano", "div")])
    with Model(base) as model:
        tokens = model.tokenize_prompt(text + word_question("mano"))
        assert model.text(tokens) == text + word_question("mano")
    assert len(tokens) == 1 + 1 + 4 + 1 + 1  # BOS { pairs } key


def test_finds_everything_up_to_the_length_that_it_was_trained_on(base: Path) -> None:
    with Model(base, n_threads=1) as model:
        for n_pairs in (8, 24, TRAINED):
            task = KeyValueTask(n_pairs, probes=8, identifiers="word", seed=UNSEEN)
            evaluator = TeacherForcedEvaluator(model, task)
            scores = [evaluator.evaluate(BASE, "test", i) for i in range(25)]
            by_depth = np.mean([[probe.correct for probe in score.probes] for score in scores], axis=0)
            assert by_depth.min() >= 0.95, (n_pairs, by_depth)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_quantized_it_still_does(written: Path, folder: Path, kind: str) -> None:
    path = folder / f"{kind}.gguf"
    done = subprocess.run([tool_path("llama-quantize"), written, path, kind, "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    factors = file_factors(path)
    assert factors == read_factors(written)
    plain, curved = accuracy(path, [BASE, factors])
    assert curved > plain + 0.05


def test_split_and_merged_it_is_the_same(written: Path, folder: Path) -> None:
    tool = tool_path("llama-gguf-split")
    subprocess.run([tool, "--split", "--split-max-tensors", "15", written, folder / "part"], check=True)
    parts = sorted(folder.glob("part-*.gguf"))
    assert len(parts) == 3
    subprocess.run([tool, "--merge", parts[0], folder / "merged.gguf"], check=True)
    factors = read_factors(written)
    for path in (parts[0], folder / "merged.gguf"):
        assert read_factors(path) == factors == file_factors(path)
        assert accuracy(path, [factors], n=2) == accuracy(written, [factors], n=2)
