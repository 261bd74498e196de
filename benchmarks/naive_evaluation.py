"""What a candidate costs: ours against what one would write first on llama-cpp-python's high-level API.

The first way: write the candidate's factors into the model file, load it, and for each probe give the whole prompt to
`Llama`, let it generate, and look whether the answer is in the text. The same with `Llama`'s own prefix cache, which
computes again only what differs from the prompt before. Ours: the model stays loaded, factors change at run time, the
context is computed once, and answers are fed instead of generated. All ways take turns. Usage:

    python benchmarks/naive_evaluation.py MODEL [--keys 40] [--candidates 2] [--threads N]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from tables import command, cpu_model, head, row, script

from lrope_gguf import write_factors
from lrope_search.evaluation.encoding import MAX_NEW_TOKENS
from lrope_search.evaluation.evaluator import TeacherForcedEvaluator
from lrope_search.evaluation.model import Model
from lrope_search.machine import physical_cores
from lrope_search.tasks import IDENTIFIERS, KeyValueTask
from lrope_search.tasks.task import Context


class Cost(NamedTuple):
    n_tokens: int
    seconds: float
    n_correct: int


def high_level(
    path: Path, factors: tuple[float, ...], context: Context, n_ctx: int, args: argparse.Namespace, *,
    prefix_cache: bool,
) -> Cost:  # fmt: skip
    from llama_cpp import Llama  # after our model: on the library that it has set

    start = time.perf_counter()
    write_factors(path, factors)
    llama: Any = Llama(
        str(path), n_ctx=n_ctx, n_batch=args.batch_size, n_threads=args.threads, n_threads_batch=args.threads,
        flash_attn=True, swa_full=True, verbose=False,
    )  # fmt: skip
    n_tokens = 0
    decode = llama._ctx.decode

    def count(batch: Any) -> None:
        nonlocal n_tokens
        n_tokens += batch.n_tokens()
        decode(batch)

    llama._ctx.decode = count
    chat = "tokenizer.chat_template" in llama.metadata
    n_correct = 0
    for probe in context.probes:
        if not prefix_cache:
            llama.reset()
        prompt, limits = context.prefix + probe.question, {"max_tokens": MAX_NEW_TOKENS, "temperature": 0.0}
        if chat:
            message = {"role": "user", "content": prompt}
            text = llama.create_chat_completion([message], **limits)["choices"][0]["message"]["content"]
        else:
            text = llama.create_completion(prompt + args.answer_prefix, **limits)["choices"][0]["text"]
        n_correct += probe.answer.lower() in text.lower()
    llama.close()
    return Cost(n_tokens, time.perf_counter() - start, n_correct)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--keys", type=int, default=40)
    parser.add_argument("--identifiers", choices=IDENTIFIERS, default="uuid")
    parser.add_argument("--answer-prefix", default="")
    parser.add_argument("--candidates", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--threads", type=int, default=physical_cores())
    args = parser.parse_args()
    task = KeyValueTask(args.keys, identifiers=args.identifiers)
    context = task.context("search", 0)
    costs: dict[str, list[Cost]] = {}
    with (
        Model(args.model, n_threads=args.threads, n_batch=args.batch_size) as model,
        tempfile.TemporaryDirectory() as temporary,
    ):
        evaluator = TeacherForcedEvaluator(model, task, answer_prefix=args.answer_prefix)
        copy = Path(temporary, "model.gguf")
        write_factors(args.model, (1.0,) * evaluator.n_layer, output=copy)
        for i in range(args.candidates):
            factors = tuple(1.0 + 0.002 * i + 0.001 * (layer % 3) for layer in range(evaluator.n_layer))
            for name, cached in (
                ("prompt by prompt, no prefix cache", False),
                ("prompt by prompt, prefix cache", True),
            ):
                cost = high_level(copy, factors, context, model.n_ctx, args, prefix_cache=cached)
                costs.setdefault(f"Llama, {name}", []).append(cost)
            score = evaluator.evaluate(factors, "search", 0)
            n_correct = round(sum(probe.correct for probe in score.probes))
            costs.setdefault("evaluator", []).append(Cost(score.n_tokens, score.seconds, n_correct))
            print(f"candidate {i + 1} of {args.candidates}", file=sys.stderr)
    print(command())
    print(f"{cpu_model()}, {os.cpu_count()} cores, {args.threads} threads; model {args.model.name}")
    print(f"{len(context.probes)} probes of one context, {args.candidates} candidates; medians\n")
    print(head("a candidate", "tokens computed", "ratio", "seconds", "ratio", "right answers"))
    ours = costs["evaluator"]
    for name, of_way in costs.items():
        tokens, own_tokens = (statistics.median(c.n_tokens for c in way) for way in (of_way, ours))
        seconds = statistics.median(c.seconds for c in of_way)
        ratio = statistics.median(a.seconds / b.seconds for a, b in zip(of_way, ours, strict=True))
        right = ", ".join(str(c.n_correct) for c in of_way)
        print(row((name, f"{tokens:.0f}", f"{tokens / own_tokens:.2f}", f"{seconds:.1f}", f"{ratio:.2f}", right)))


if __name__ == "__main__":
    script(main)
