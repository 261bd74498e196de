"""`llama-server --rope-scaling dynamic`, chatted past the trained length over HTTP, and slots kept on the disk."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from support.rope_models import FACTORS, LLAMA
from support.tiny_models import readable, write_readable

from lrope_gguf.errors import LropeError
from lrope_gguf.metadata import remove_factors, write_factors
from lrope_gguf.native import tool_path
from lrope_gguf.rope_scaling import Scaling
from lrope_search.demo.server import LlamaServer
from lrope_search.evaluation.evaluator import TeacherForcedEvaluator
from lrope_search.evaluation.model import Model
from lrope_search.tasks import KeyValueTask

pytestmark = pytest.mark.native

MODEL = Path(__file__).parent.parent / "models" / "lrope-kv.gguf"
TRAINED = 100  # tokens: models/README.md
SCALED = {kind: ["--rope-scaling", kind, "--yarn-orig-ctx", str(TRAINED)] for kind in ("dynamic", "dynamic-yarn")}
N_KEYS, N_CONTEXTS = 196, 3  # four times the trained length
GROWING = (0.2, 0.45, 0.7, 1.0)


def right_answers(options: Sequence[str], *, grow: bool) -> list[bool]:
    """Whether each question is answered, by a server that sees the context at once or as it grows, as in a chat."""
    task = KeyValueTask(N_KEYS, probes=20, identifiers="word")
    results = []
    with LlamaServer(MODEL, 1024, n_threads=1, options=options) as server:
        for index in range(N_CONTEXTS):
            context = task.context("test", index)
            for share in GROWING if grow else ():
                server.complete(context.prefix[: int(share * len(context.prefix))], 2)
            for probe in context.probes:
                results.append(probe.answered_by(server.complete(context.prefix + probe.question, 4)))
    return results


def test_a_chat_past_the_trained_length_is_answered_where_stock_does_not() -> None:
    stock = right_answers([], grow=True)
    for kind, options in SCALED.items():
        grown = right_answers(options, grow=True)
        assert sum(grown) > sum(stock) + 6, kind
        # keys that turned several times give what a context that came at once gives
        at_once = right_answers(options, grow=False)
        assert sum(a != b for a, b in zip(grown, at_once, strict=True)) <= 1, kind


def test_a_written_file_needs_no_option(tmp_path: Path) -> None:
    """Without one, the server's context is the length in the file, and stock's scaling there would be static YaRN."""
    path = tmp_path / "written.gguf"
    write_factors(MODEL, output=path, scaling=Scaling("dynamic-yarn", context_length=1000, original=TRAINED))
    context = KeyValueTask(N_KEYS, probes=20, identifiers="word").context("test", 0)
    with LlamaServer(path, 0, n_threads=1) as server:
        assert server.properties()["default_generation_settings"]["n_ctx"] == 1000
        answers = [probe.answered_by(server.complete(context.prefix + probe.question, 4)) for probe in context.probes]
    assert sum(answers) >= 17
    remove_factors(path)
    assert path.read_bytes() == MODEL.read_bytes()


def test_the_environment_says_it_too_and_the_server_allows_longer_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_ARG_ROPE_SCALING_TYPE", "dynamic-yarn")
    with LlamaServer(MODEL, 1024, n_threads=1, options=["--yarn-orig-ctx", str(TRAINED)]) as server:
        assert server.properties()["default_generation_settings"]["n_ctx"] == 1024
        assert "RoPE scaling is dynamic, there is none up to the trained length" in server.log


def refusal(target: Path, *options: str) -> str:
    """What a server prints that does not start."""
    command = [str(tool_path("llama-server")), "--model", str(target), *options, "--host", "127.0.0.1", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    return done.stdout + done.stderr


def test_a_draft_model_must_be_scaled_alike(tmp_path: Path) -> None:
    plain = write_readable(tmp_path / "plain.gguf")
    scaled = write_readable(
        tmp_path / "scaled.gguf", replace(readable(LLAMA), metadata=(("rope.scaling.dynamic_factor", 1.0),))
    )
    drafting = ["--spec-type", "draft-simple", "--model-draft"]
    with LlamaServer(plain, 512, n_threads=1, options=["--rope-scaling", "dynamic", *drafting, str(plain)]) as server:
        server.complete("a", 2)
    for target, draft in ((scaled, plain), (plain, scaled)):
        words = "the draft model has another RoPE scaling than the model, see --rope-scaling"
        assert words in refusal(target, *drafting, str(draft))


def test_what_cannot_be_scaled_ends_the_server_in_words() -> None:
    words = "it sets the frequency base itself (remove --rope-freq-base)"
    assert words in refusal(MODEL, "--rope-scaling", "dynamic", "--rope-freq-base", "5000")


def test_a_slot_that_was_saved_under_other_factors_is_not_restored(tmp_path: Path) -> None:
    model = write_readable(tmp_path / "tiny.gguf")
    slots = ["--slot-save-path", str(tmp_path)]
    listed = ",".join(map(str, FACTORS))

    def restored(*options: str) -> tuple[bool, str]:
        with LlamaServer(model, 512, n_threads=1, options=[*slots, *options]) as server:
            try:
                server._ask("/slots/0?action=restore", {"filename": "slot"})
            except LropeError:
                return False, server.log
            return True, server.log

    with LlamaServer(model, 512, n_threads=1, options=[*slots, "--rope-layer-factors", listed]) as server:
        server.complete(list(range(40, 80)), 1)
        server._ask("/slots/0?action=save", {"filename": "slot"})
    assert restored("--rope-layer-factors", listed)[0]
    ok, log = restored()
    assert not ok and "the keys of the state were rotated with a RoPE factor of 1.3 in layer 1" in log


@pytest.mark.parametrize("kind", SCALED)
def test_an_evaluation_asks_what_the_server_is_asked(kind: str) -> None:
    """Scores on the host and on the device, side by side, and what a server answers to the same questions."""
    task = KeyValueTask(N_KEYS, probes=20, identifiers="word")
    options = {"rope_scaling": kind, "yarn_orig_ctx": TRAINED}
    with Model(MODEL, n_threads=1, llama_options=options) as model:
        evaluator = TeacherForcedEvaluator(model, task)
        scores = {}
        for evaluator.scoring in ("host", "device"):
            base = (1.0,) * evaluator.n_layer
            scores[evaluator.scoring] = [evaluator.evaluate(base, "test", index) for index in range(N_CONTEXTS)]
    host, device = ([p for score in scores[name] for p in score.probes] for name in ("host", "device"))
    assert [p.correct for p in host] == [p.correct for p in device]
    assert max(abs(a.log_probability - b.log_probability) for a, b in zip(host, device, strict=True)) < 1e-3
    answers = right_answers(SCALED[kind], grow=False)
    assert sum(p.correct != right for p, right in zip(host, answers, strict=True)) <= 2
