"""A judge that is not ours: EleutherAI's lm-eval asks `llama-server` with a base model and with the written one.

lm-eval (Gao et al., doi 10.5281/zenodo.12608602) runs as a program of its own, over the OpenAI-compatible completions
API of the patched `llama-server`; how it asks, what it calls right and its standard errors are its own. Beside them
stands, from the samples that it logs, the difference of both models with a 95 % bootstrap interval: paired, over
contexts. `kv` exports our key-value contexts as a task of lm-eval, and asks our own `measure` the very same questions.
`ruler` takes lm-eval's own RULER tasks (Hsieh et al., arXiv 2404.06654), those that need no download. Usage:

    python research/outside_judge.py kv MODEL --curve CURVE [--contexts 20] [task and model options as of eval]
    python research/outside_judge.py ruler MODEL --curve CURVE [--tasks ruler_vt] [--length 4096] [--limit 20]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from options import add_model_options, add_task_options, dispatch, model_of, table, task_of

from lrope_gguf import write_factors
from lrope_gguf.errors import LropeError
from lrope_gguf.gguf_file import GGUFFile
from lrope_gguf.model_info import read_model
from lrope_search import ModelConfig, TaskConfig, TaskMix, measure
from lrope_search.commands.curve_files import factors_of_curve
from lrope_search.demo.server import LlamaServer
from lrope_search.results.comparison import Comparison, compare
from lrope_search.results.table import DepthTable, with_interval
from lrope_search.scores import ContextScore, Factors, ProbeScore, rows_of
from lrope_search.study.interrupt import one_interrupt
from lrope_search.tasks import make_task

KV = "lrope_kv"
RULER = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
"""Tasks of lm-eval whose texts are made on the spot; the other ones download essays or questions."""
ANSWER_ROOM = 512
"""Tokens for an answer beside a RULER prompt: fwe's prompts fill the whole length by themselves."""
LEAST = 1024
"""Tokens of the shortest prompts: where its smallest text does not fit, lm-eval tries without end."""
SIDES = ("base", "written")

Key: TypeAlias = tuple[str, str, str]
"""Task, metric and filter of a figure, as lm-eval names them."""


@dataclass(frozen=True)
class Judgement:
    """What lm-eval found of one model.

    Attributes:
        figures: Each figure with lm-eval's standard error; None where it gives none.
        samples: Of each task, what lm-eval logged: a record a question and filter.
        seconds: Wall-clock time of the whole run.
    """

    figures: Mapping[Key, tuple[float, float | None]]
    samples: Mapping[str, Sequence[Mapping[str, Any]]]
    seconds: float


# Tasks


def export_kv(config: TaskConfig, contexts: int, folder: Path) -> int:
    """Write the first test contexts of a ``kv`` task into ``folder`` as a task of lm-eval, `KV`.

    An answer ends at a blank if the values are words, else with its line, and is right if nothing but punctuation and
    blanks tells it from the value (lm-eval's ``exact_match``). Every record holds its context and depth.

    Returns:
        Tokens that the longest prompt with its answer takes at most: a token has at least a byte.
    """
    task = make_task(config)
    lead = task.calibration().lead.removeprefix(config.answer_prefix)
    records, longest, room = [], 0, 0
    for index in range(contexts):
        context = task.context("test", index)
        for probe in context.probes:
            prompt = context.prefix + probe.question + config.answer_prefix
            records.append({"prompt": prompt, "answer": probe.answer, "context": index, "depth": probe.depth})
            longest = max(longest, len(prompt.encode()))
            room = max(room, len(f"{lead}{probe.answer}".encode()) + 2)
    data = folder / f"{KV}.jsonl"
    data.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    end = " " if config.to_json()["identifiers"] == "word" else "\n"
    description = {
        "task": KV,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [end], "max_gen_toks": room},
        "metric_list": [
            {
                "metric": "exact_match", "aggregation": "mean", "higher_is_better": True,
                "regexes_to_ignore": [r"\W"], "ignore_case": True,
            }
        ],
    }  # fmt: skip
    (folder / f"{KV}.yaml").write_text(json.dumps(description, indent=1))  # JSON is YAML
    return longest + room


_SPLITS = {
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
}
"""How a text is split before its pieces are merged, by ``tokenizer.ggml.pre`` (src/llama-vocab.cpp of llama.cpp)."""
_CONTROL, _USER_DEFINED = 3, 4  # enum llama_token_type of llama.h


def export_tokenizer(model: Path | str, folder: Path) -> bool:
    """Write a model's byte-level BPE vocabulary into ``folder`` as a tokenizer of Hugging Face (``tokenizer.json``).

    lm-eval sizes RULER's prompts by it. What kind of splitting is not in `_SPLITS` becomes GPT-2's: prompts then are a
    little shorter or longer than they should be.

    Returns:
        Whether there is a chat template with it.
    """
    with GGUFFile(model) as gguf:
        if gguf.text("tokenizer.ggml.model") != "gpt2":
            raise LropeError(f"{model}: its vocabulary is no byte-level BPE; give --tokenizer FOLDER")
        tokens, merges = (_strings(gguf, f"tokenizer.ggml.{name}") for name in ("tokens", "merges"))
        types = gguf.integers("tokenizer.ggml.token_type", len(tokens)) or ()
        split = _SPLITS.get(gguf.text("tokenizer.ggml.pre") or "", _SPLITS["gpt-2"])
        template = gguf.text("tokenizer.chat_template", limit=1 << 20)
    added = [
        {"id": i, "content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": kind == _CONTROL}
        for i, kind in enumerate(types) if kind in (_CONTROL, _USER_DEFINED)
    ]  # fmt: skip
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    pieces = {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
    document = {
        "version": "1.0", "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [pieces, bytes_only]}, "decoder": bytes_only,
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(document))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | ({"chat_template": template} if template else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return template is not None


def _strings(gguf: GGUFFile, key: str) -> list[str]:
    """Return an array of strings, empty where there is none."""
    entry = gguf.entries.get(key)
    if entry is None:
        return []
    data, at, found = gguf.read(entry.value, entry.end), 0, []
    for _ in range(entry.length):
        (n,) = struct.unpack_from(f"{gguf.order}Q", data, at)
        found.append(data[at + 8 : at + 8 + n].decode(errors="replace"))
        at += 8 + n
    return found


# lm-eval


def judge(
    program: str, path: Path | str, tasks: Sequence[str], folder: Path, n_ctx: int, model: ModelConfig,
    options: Sequence[str] = (), tokenizer: str | None = None,
) -> Judgement:  # fmt: skip
    """Serve ``path`` as ``model`` says, in a context of ``n_ctx`` tokens, and let lm-eval ask it.

    ``folder``: where lm-eval writes; beside it are tasks that it does not know. ``options``: more of lm-eval's.
    ``tokenizer``: a folder; lm-eval then puts prompts into its chat template, and sends their tokens. None: it sends
    text, which the server's own tokenizer turns into tokens.
    """
    folder.mkdir()
    layers = [] if model.n_gpu_layers is None else ["--gpu-layers", str(model.n_gpu_layers)]
    served = ["--batch-size", str(model.batch_size), *layers, "--swa-full"]
    # no downloads, nothing left in the user's caches, no proxy on the way to this machine
    (folder / "nltk/tokenizers/punkt_tab").mkdir(parents=True)  # else the niah tasks fetch it, and never use it
    environment = {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "NLTK_DATA": str(folder / "nltk"),
                   "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "LMEVAL_LOG_LEVEL": "ERROR"}  # fmt: skip
    start = time.perf_counter()
    with LlamaServer(path, n_ctx, n_threads=model.n_threads, options=served) as server:
        arguments = {"model": "served", "base_url": f"{server.url}/v1/completions", "timeout": 3600}
        if tokenizer is None:
            arguments["tokenizer_backend"], chat = "None", []
        else:
            arguments |= {"tokenizer_backend": "huggingface", "tokenizer": tokenizer, "max_length": n_ctx}
            chat = ["--apply_chat_template"]
        command = [
            *(program, "run", "--model", "local-completions", "--tasks", *tasks, *options, *chat),
            *("--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())),
            *("--include_path", str(folder.parent), "--output_path", str(folder / "out"), "--log_samples"),
        ]
        run_lm_eval(command, {**os.environ, **environment}, None if model.verbose else folder / "log.txt")
    return read_judgement(folder / "out", time.perf_counter() - start)


def run_lm_eval(command: Sequence[str], environment: Mapping[str, str], log: Path | None) -> None:
    """Run lm-eval; what it prints goes into ``log``, or to the standard error."""
    with nullcontext(sys.stderr.fileno()) if log is None else log.open("wb") as output:
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    if done.returncode:
        text = "" if log is None else log.read_text(errors="replace").strip()
        last = text.splitlines()[-1] if text else f"exit status {done.returncode}"
        raise LropeError(f"--lm-eval {command[0]}: failed: {last}")


def read_judgement(folder: Path, seconds: float) -> Judgement:
    """Return what lm-eval wrote below ``folder``.

    Figures of -1 are left out: RULER's mark for lengths that were not asked.
    """
    found = sorted(folder.rglob("results_*.json"))
    if not found:
        raise LropeError(f"{folder}: lm-eval wrote no results")
    results = json.loads(found[-1].read_text())["results"]
    figures: dict[Key, tuple[float, float | None]] = {}
    for task, values in results.items():
        for name, value in values.items():
            metric, _, kind = name.partition(",")
            if not kind or metric.endswith("_stderr") or value == -1:
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            figures[task, metric, kind] = value, error if isinstance(error, float) else None
    samples: dict[str, list[dict[str, Any]]] = {}
    for task in results:
        files = sorted(found[-1].parent.glob(f"samples_{task}_2*.jsonl"))  # 2: a year begins with it
        samples[task] = [json.loads(line) for file in files[-1:] for line in file.read_text().splitlines()]
    return Judgement(figures, samples, seconds)


def contexts_of(samples: Sequence[Mapping[str, Any]], metric: str, kind: str) -> list[ContextScore]:
    """Return logged scores by context: the one that a record names, else each record is one."""
    own = sorted((sample for sample in samples if sample["filter"] == kind), key=lambda sample: int(sample["doc_id"]))
    by_context: dict[int, list[ProbeScore]] = {}
    for sample in own:
        score = ProbeScore(sample["doc"].get("depth", 0.0), math.nan, float(sample[metric]))
        by_context.setdefault(sample["doc"].get("context", sample["doc_id"]), []).append(score)
    return [ContextScore("test", index, tuple(probes), 0, 0.0) for index, probes in by_context.items()]


def paired(base: Judgement, other: Judgement, key: Key) -> Comparison:
    """Compare two models in one figure, question by question."""
    task, metric, kind = key
    asked = [
        {(s["doc_id"], s["doc_hash"], s["prompt_hash"], s["target_hash"]) for s in side.samples.get(task, ())}
        for side in (base, other)
    ]
    if not asked[0] or asked[0] != asked[1]:
        raise LropeError(f"{task}: lm-eval did not ask both models the same questions")
    return compare(*(contexts_of(side.samples[task], metric, kind) for side in (base, other)))


# Table


def judged_rows(sides: Sequence[Judgement]) -> list[list[str]]:
    base, other = sides
    rows = []
    for key in base.figures:
        cells = []
        for side in sides:
            value, error = side.figures[key]
            cells.append(f"{100 * value:.1f}" + ("" if error is None else f" ± {100 * error:.1f}"))
        found = paired(base, other, key)
        n = sum(row.n_probes for row in found.by_depth)
        rows.append([f"lm-eval, {key[0]}, {key[1]}", str(n), *cells, with_interval(found, found.accuracy_gain, 100, 1)])
    return rows


def measured_row(name: str, table: DepthTable) -> list[str]:
    found = table.comparisons["written"]
    cells = [f"{100 * table.totals[side].accuracy:.1f}" for side in SIDES]
    return [f"lrope_search, {name}", str(table.n_probes), *cells, with_interval(found, found.accuracy_gain, 100, 1)]


def print_table(rows: Sequence[Sequence[str]]) -> None:
    print(table(("judge", "questions", "base, %", "written, %", "difference, points"), rows))


# Commands


def both(
    args: argparse.Namespace, tasks: Sequence[str], folder: Path, n_ctx: int, options: Sequence[str] = (),
    tokenizer: str | None = None,
) -> tuple[list[Judgement], Factors]:  # fmt: skip
    """Let lm-eval judge the base model and the written one, see `judge`; also return the factors."""
    if shutil.which(args.lm_eval) is None:
        raise LropeError(f"--lm-eval {args.lm_eval}: no such program; install it: pip install 'lm-eval[api]'")
    info = read_model(args.model)
    if info.factors is not None:
        raise LropeError(f"{args.model}: holds factors already; give the base model (lrope-gguf remove)")
    factors, written = factors_of_curve(args.curve, info), folder / "written.gguf"
    rows = rows_of(factors)
    write_factors(
        args.model,
        factors,
        head_factors=rows.get("head_factors"),
        query_scales=rows.get("query_scales"),
        output=written,
    )
    model, found = model_of(args), []
    for name, path in zip(SIDES, (args.model, written), strict=True):
        found.append(judge(args.lm_eval, path, tasks, folder / name, n_ctx, model, options, tokenizer))
        if args.output is not None:
            shutil.copytree(folder / name / "out", Path(args.output, name), dirs_exist_ok=True)
        n = sum(len({sample["doc_id"] for sample in samples}) for samples in found[-1].samples.values())
        seconds = found[-1].seconds
        print(f"{name}: {n} questions in {seconds:.0f} s, {seconds / n:.2f} s each", file=sys.stderr, flush=True)
    return found, factors


def kv(args: argparse.Namespace) -> None:
    task = task_of(args)
    if task.name != "kv" or task.to_json()["context_tokens"] is not None:
        raise LropeError("--task, --context-tokens: only the kv task is exported, of so many --keys")
    TaskMix.of(task).check_contexts("--contexts", args.contexts)
    with tempfile.TemporaryDirectory() as folder:
        n_ctx = export_kv(task, args.contexts, Path(folder))
        sides, factors = both(args, [KV], Path(folder), n_ctx)
    model = replace(model_of(args), chat_template=False)  # the API gives prompts as they are
    own = measure(model, task, {"written": factors}, contexts=args.contexts, generate=True)
    assert own.generated is not None
    print_table([*judged_rows(sides), measured_row("answers written", own.generated),
                 measured_row("answers fed", own.table)])  # fmt: skip


def ruler(args: argparse.Namespace) -> None:
    for option, value, least in (("--limit", args.limit, 1), ("--length", args.length, LEAST)):
        if value < least:
            raise LropeError(f"{option} {value}: too few; give at least {least}")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, chat = args.tokenizer, True
        if tokenizer is None:
            tokenizer = str(Path(folder, "tokenizer"))
            Path(tokenizer).mkdir()
            chat = export_tokenizer(args.model, Path(tokenizer))
        metadata = json.dumps({"max_seq_lengths": [args.length], "tokenizer": tokenizer})
        options, n_ctx = ["--metadata", metadata, "--limit", str(args.limit)], args.length + ANSWER_ROOM
        chat = chat and not args.no_chat_template
        sides, _ = both(args, args.tasks, Path(folder), n_ctx, options, tokenizer if chat else None)
    print_table(judged_rows(sides))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, add_options in (("kv", add_task_options), ("ruler", add_ruler_options)):
        command = commands.add_parser(name)
        command.add_argument("model", metavar="MODEL", help="GGUF file without factors")
        command.add_argument("--curve", metavar="FILE", required=True, help="curve file, or the name of one of ours")
        command.add_argument("--lm-eval", metavar="PATH", default="lm_eval", help="the program (%(default)s on PATH)")
        command.add_argument("--output", metavar="FOLDER", help="keep what lm-eval writes, results and samples")
        add_options(command)
        add_model_options(command)
    kv_command = commands.choices["kv"]
    kv_command.add_argument("--contexts", metavar="N", type=int, default=20, help="test contexts (%(default)s)")
    kv_command.set_defaults(seed=1000)  # contexts that no search saw
    try:
        with one_interrupt():
            dispatch(parser, {"kv": kv, "ruler": ruler})
    except KeyboardInterrupt as interrupt:
        sys.exit(*interrupt.args[:1] or (130,))


def add_ruler_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tasks", nargs="+", choices=RULER, default=["ruler_vt"])
    parser.add_argument("--length", metavar="N", type=int, default=4096, help="tokens a prompt (%(default)s)")
    parser.add_argument("--limit", metavar="N", type=int, default=20, help="samples a task (%(default)s)")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="of Hugging Face (made from MODEL's vocabulary)")


if __name__ == "__main__":
    main()
