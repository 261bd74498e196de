"""research/outside_judge.py without lm-eval: what it is given, what it writes, and what becomes of that."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import outside_judge as judge
import pytest

from lrope_gguf import LropeError
from lrope_search import task_config
from lrope_search.demo.model import embedded_model
from lrope_search.tasks import make_task

EXACT = ("lrope_kv", "exact_match", "none")

# stands for lm-eval: writes the results that are in its place, once for each run
PROGRAM = """#!{python}
import json, sys
from pathlib import Path
word = dict(zip(sys.argv, sys.argv[1:]))
Path("{folder}/command.json").write_text(json.dumps(sys.argv))
out = Path(word["--output_path"], "served")
out.mkdir(parents=True)
for source in Path("{folder}", Path(word["--output_path"]).parent.name).iterdir():
    (out / source.name).write_text(source.read_text())
"""


def record(doc_id: int, score: float, doc: Mapping[str, Any] | None = None, **others: Any) -> dict[str, Any]:
    hashes = {name: f"{name}{doc_id}" for name in ("doc_hash", "prompt_hash", "target_hash")}
    return {"doc_id": doc_id, "doc": doc or {}, "filter": "none", "exact_match": score, **hashes, **others}


def write_results(folder: Path, samples: Sequence[Mapping[str, Any]], values: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results_2026-01-01T00-00-00.json").write_text(json.dumps({"results": {"lrope_kv": values}}))
    lines = "".join(f"{json.dumps(sample)}\n" for sample in samples)
    (folder / "samples_lrope_kv_2026-01-01T00-00-00.jsonl").write_text(lines)


def by_context(right: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """The records of contexts with these scores."""
    docs = [({"context": i, "depth": k / 10}, score) for i, row in enumerate(right) for k, score in enumerate(row)]
    return [record(n, score, doc) for n, (doc, score) in enumerate(docs)]


def test_the_exported_task_asks_what_our_own_task_asks(tmp_path: Path) -> None:
    config = task_config("kv", keys=20, probes=5, identifiers="word", seed=1000)
    n_ctx = judge.export_kv(config, 3, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "lrope_kv.jsonl").read_text().splitlines()]
    contexts = [make_task(config).context("test", index) for index in range(3)]
    asked = [(c.prefix + p.question, p.answer, c.index, p.depth) for c in contexts for p in c.probes]
    assert [(r["prompt"], r["answer"], r["context"], r["depth"]) for r in records] == asked
    task = json.loads((tmp_path / "lrope_kv.yaml").read_text())
    assert task["task"] == "lrope_kv" and task["dataset_kwargs"]["data_files"]["test"].endswith("lrope_kv.jsonl")
    assert task["generation_kwargs"]["until"] == [" "]
    assert n_ctx > max(len(r["prompt"]) for r in records) + len("=bab")


def test_answers_that_a_prefix_begins_have_room_for_all_of_a_uuid(tmp_path: Path) -> None:
    judge.export_kv(task_config("kv", keys=4, probes=2, answer_prefix=' "'), 1, tmp_path)
    task = json.loads((tmp_path / "lrope_kv.yaml").read_text())
    assert task["generation_kwargs"] == {"until": ["\n"], "max_gen_toks": 38}
    first = json.loads((tmp_path / "lrope_kv.jsonl").read_text().splitlines()[0])
    assert first["prompt"].endswith('Corresponding value: "')


def test_results_are_read_without_what_was_not_asked(tmp_path: Path) -> None:
    values = {"alias": "lrope_kv", "sample_len": 2, "exact_match,none": 0.5, "exact_match_stderr,none": 0.1,
              "4096,none": -1, "4096_stderr,none": "N/A", "8192,none": 0.25, "8192_stderr,none": "N/A"}  # fmt: skip
    write_results(tmp_path / "served", [record(0, 1.0), record(1, 0.0)], values)
    found = judge.read_judgement(tmp_path, 3.0)
    assert found.figures == {EXACT: (0.5, 0.1), ("lrope_kv", "8192", "none"): (0.25, None)}
    assert [sample["doc_id"] for sample in found.samples["lrope_kv"]] == [0, 1]
    with pytest.raises(LropeError, match="no results"):
        judge.read_judgement(tmp_path / "elsewhere", 0.0)


def test_questions_are_paired_and_contexts_resampled() -> None:
    """Order does not matter; questions that share a context are no evidence of their own."""
    base = judge.Judgement({}, {"lrope_kv": by_context([[0, 0, 1, 1]] * 4 + [[0, 0, 0, 0]] * 4)}, 0.0)
    other = judge.Judgement({}, {"lrope_kv": by_context([[1, 1, 1, 1]] * 8)[::-1]}, 0.0)
    found = judge.paired(base, other, EXACT)
    assert found.n_contexts == 8 and (found.base_accuracy, found.accuracy) == (0.25, 1.0)
    assert found.accuracy_gain.mean == 0.75
    assert 0.4 < found.accuracy_gain.low < 0.6 and 0.9 < found.accuracy_gain.high <= 1.0
    alone = [{**sample, "doc": {}} for sample in base.samples["lrope_kv"]]
    every = [{**sample, "doc": {}} for sample in other.samples["lrope_kv"]]
    narrower = judge.paired(*(judge.Judgement({}, {"lrope_kv": side}, 0.0) for side in (alone, every)), EXACT)
    assert narrower.n_contexts == 32 and narrower.accuracy_gain.low > found.accuracy_gain.low


@pytest.mark.parametrize("others", [{"doc_hash": "another"}, {"prompt_hash": "another"}, {"doc_id": 7}])
def test_other_questions_are_not_compared(others: dict[str, Any]) -> None:
    sides = [judge.Judgement({}, {"lrope_kv": [{**record(0, 1.0), **more}]}, 0.0) for more in ({}, others)]
    with pytest.raises(LropeError, match="same questions"):
        judge.paired(*sides, EXACT)


class NoServer:
    """In place of `llama-server`."""

    url = "http://127.0.0.1:1"
    running = 0
    served: list[str]

    def __init__(self, path: Path | str, n_ctx: int, **others: Any) -> None:
        NoServer.served.append(Path(path).name)

    def __enter__(self) -> NoServer:
        NoServer.running += 1
        return self

    def __exit__(self, *_: object) -> None:
        NoServer.running -= 1


def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: Path | str, task: str, *options: str) -> None:
    """Run the script on the embedded model, with nothing served."""
    curve = tmp_path / "curve.json"
    curve.write_text('{"format": "lrope-curve", "version": 1, "layer_factors": [1.0, 1.0, 3.0, 1.5]}')
    NoServer.served = []
    monkeypatch.setattr(judge, "LlamaServer", NoServer)
    words = [task, str(embedded_model()), "--curve", str(curve), "--lm-eval", str(program), *options]
    monkeypatch.setattr(sys, "argv", ["outside_judge.py", *words])
    judge.main()


def program(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "lm_eval"
    path.write_text(text.format(python=sys.executable, folder=tmp_path))
    path.chmod(0o755)
    return path


def test_both_models_are_judged_side_by_side(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, right in (("base", [[0.0, 1.0]] * 8), ("written", [[1.0, 1.0]] * 8)):
        share = sum(map(sum, right)) / 16
        values = {"exact_match,none": share, "exact_match_stderr,none": 0.125}
        write_results(tmp_path / name, by_context(right), values)
    run(monkeypatch, tmp_path, program(tmp_path, PROGRAM), "ruler", "--output", str(tmp_path / "kept"))
    assert len(list(tmp_path.glob("kept/*/served/samples_*.jsonl"))) == 2
    out = capsys.readouterr().out.splitlines()
    row = r"\| lm-eval, lrope_kv, exact_match \| 16 \| 50.0 ± 12.5 \| 100.0 ± 12.5 \| \+50.0 \[\+\d+.\d, \+\d+.\d\] \|"
    assert out[0].startswith("| judge |") and re.fullmatch(row, out[-1])
    assert NoServer.served == ["lrope-kv.gguf", "written.gguf"] and not NoServer.running
    command = json.loads((tmp_path / "command.json").read_text())
    assert command[1:4] == ["run", "--model", "local-completions"] and "--log_samples" in command
    assert "tokenizer_backend=None" in command[command.index("--model_args") + 1]  # the model has no chat template
    assert json.loads(command[command.index("--metadata") + 1])["max_seq_lengths"] == [4096]


FAILING = "#!/bin/sh\necho Traceback >&2\necho 'ValueError: no such task' >&2\nexit 1\n"
MISTAKES = {
    "missing": (None, ["kv"], "pip install 'lm-eval[api]'"),
    "missing, ruler": (None, ["ruler"], "pip install 'lm-eval[api]'"),
    "contexts": (PROGRAM, ["kv", "--contexts", "0"], "--contexts 0: too few"),
    "limit": (PROGRAM, ["ruler", "--limit", "0"], "--limit 0: too few"),
    "length": (PROGRAM, ["ruler", "--length", "0"], "--length 0: too few"),
    "failing": (FAILING, ["ruler"], "lm_eval: failed: ValueError: no such task"),
}


@pytest.mark.parametrize(("text", "words", "said"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line_and_no_server_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    text: str | None, words: list[str], said: str,
) -> None:  # fmt: skip
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, tmp_path, tmp_path / "none" if text is None else program(tmp_path, text), *words)
    message = capsys.readouterr().err
    assert end.value.code == 1 and message.count("\n") == 1 and said in message and not NoServer.running


def test_the_tokenizer_is_the_models_own_vocabulary(tmp_path: Path) -> None:
    assert judge.export_tokenizer(embedded_model(), tmp_path) is False  # it has no chat template
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    fields = gguf.GGUFReader(embedded_model()).fields
    assert list(document["model"]["vocab"]) == fields["tokenizer.ggml.tokens"].contents()
    assert document["model"]["merges"] == fields["tokenizer.ggml.merges"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    assert [token["id"] for token in document["added_tokens"]] == [i for i, kind in enumerate(types) if kind in (3, 4)]


def test_another_kind_of_vocabulary_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(LropeError, match=r"no byte-level BPE; give --tokenizer FOLDER"):
        judge.export_tokenizer(path, tmp_path)
