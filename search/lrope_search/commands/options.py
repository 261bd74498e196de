"""Options that the search commands share: the model, how it is run, and the task."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

from lrope_gguf.errors import LropeError

from ..evaluation.model import Model
from ..tasks import (
    DEFAULT_DEPTHS,
    DEFAULT_DOCUMENTS,
    DEFAULT_PAIRS,
    DEFAULT_TEMPLATE,
    IDENTIFIERS,
    JsonlTask,
    KeyValueTask,
    MultiDocumentTask,
    Task,
    TokenLimit,
)

_OPTIONS = {
    "kv": {"data", "context_tokens", "keys", "identifiers", "depths"},
    "mdqa": {"data", "context_tokens", "documents", "depths"},
    "jsonl": {"data", "prompt_template"},
}
_ALL_OPTIONS = set().union(*_OPTIONS.values())
_UUID = next(iter(IDENTIFIERS))


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare MODEL and the options of `add_model_options`."""
    parser.add_argument("model", metavar="MODEL", help="GGUF file; of a split model the first shard")
    add_model_options(parser)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Declare how a model is run."""
    group = parser.add_argument_group("model")
    group.add_argument("--threads", metavar="N", type=positive, help="CPU threads (the physical cores)")
    group.add_argument("--n-gpu-layers", metavar="N", type=int, help="layers to keep on the GPU (all that fit)")
    group.add_argument("--batch-size", metavar="N", type=positive, default=512, help="tokens a batch (%(default)s)")
    group.add_argument("--no-chat-template", action="store_true", help="give prompts as they are, to a chat model too")
    group.add_argument("--verbose", action="store_true", help="show llama.cpp's log")


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the task's options."""
    group = parser.add_argument_group("task")
    group.add_argument(
        "--task",
        choices=list(_OPTIONS),
        default="kv",
        help="kv: key-value retrieval; mdqa: multi-document question answering; jsonl: your own (%(default)s)",
    )
    group.add_argument(
        "--data",
        metavar="FILE",
        help="JSONL, plain or gzipped. kv: kv-retrieval-*_keys (contexts made from the seed); mdqa: nq-open-* of the "
        "same benchmark; jsonl: a line {context, question, answer: text or list of texts, depth: 0 to 1, optional}",
    )
    group.add_argument(
        "--context-tokens", metavar="N", type=positive, help="kv, mdqa: as many keys or documents as fit into N tokens"
    )
    group.add_argument(
        "--keys", metavar="N", type=positive, help=f"kv: pairs a context ({DEFAULT_PAIRS}; with --data all of a record)"
    )
    group.add_argument("--documents", metavar="N", type=positive,
                       help=f"mdqa: documents a context ({DEFAULT_DOCUMENTS})")  # fmt: skip
    kinds = "; ".join(f"{name}: {kind.description}" for name, kind in IDENTIFIERS.items())
    group.add_argument("--identifiers", choices=list(IDENTIFIERS),
                       help=f"kv without --data: what keys and values are; {kinds} ({_UUID})")  # fmt: skip
    group.add_argument("--depths", metavar="N", type=positive,
                       help=f"kv, mdqa: questions a context ({DEFAULT_DEPTHS})")  # fmt: skip
    group.add_argument(
        "--prompt-template", metavar="TEXT", help=f"jsonl: the prompt, \\n a new line ({escaped(DEFAULT_TEMPLATE)})"
    )
    group.add_argument(
        "--answer-prefix", metavar="TEXT", default="", help="begin all answers with this, for base models: ' \"'"
    )
    group.add_argument("--seed", metavar="N", type=natural, default=0, help="of all that is random (%(default)s)")


def open_model(args: argparse.Namespace) -> Model:
    """Load the model of the options."""
    return Model(
        args.model,
        n_batch=args.batch_size,
        n_threads=args.threads,
        n_gpu_layers=args.n_gpu_layers,
        chat=not args.no_chat_template,
        verbose=args.verbose,
    )


def fit_task(task: Task, args: argparse.Namespace, model: Model) -> Task:
    """Return the task with contexts of ``--context-tokens``, if that was given, by the model's tokenizer."""
    tokens = _with_defaults(args).context_tokens
    if tokens is None:
        return task
    return open_task(args, TokenLimit(tokens, lambda text: len(model.tokenize_prompt(text, args.answer_prefix))))


def open_task(args: argparse.Namespace, limit: TokenLimit | None = None) -> Task:
    """Make the task of the options, of which those that ``args`` lacks have their defaults.

    What is wrong with them shows without a model: contexts to be sized by tokens are as small as they can be until
    `fit_task` does it.

    Raises:
        LropeError: options that do not go together, or a file that cannot be used.
    """
    args = _with_defaults(args)
    for name in sorted(_ALL_OPTIONS - _OPTIONS[args.task]):
        if getattr(args, name) is not None:
            tasks = " and ".join(f"--task {task}" for task, own in _OPTIONS.items() if name in own)
            raise LropeError(f"--{name.replace('_', '-')}: means nothing to --task {args.task}; it is for {tasks}")
    if args.context_tokens is not None:
        for name in ("keys", "documents"):
            if getattr(args, name) is not None:
                raise LropeError(f"--{name}, --context-tokens: both give a context's size; leave out one of them")
    depths = DEFAULT_DEPTHS if args.depths is None else args.depths
    keys, documents = args.keys, args.documents
    if args.context_tokens is not None and limit is None:
        keys = documents = depths
    if args.task == "kv":
        identifiers = args.identifiers or _UUID
        return KeyValueTask(keys, depths=depths, seed=args.seed, data=args.data, identifiers=identifiers, limit=limit)
    if args.data is None:
        what = "an nq-open file" if args.task == "mdqa" else "your file of questions"
        raise LropeError(f"--task {args.task}: needs {what}; give --data FILE")
    if args.task == "mdqa":
        return MultiDocumentTask(args.data, documents, depths=depths, seed=args.seed, limit=limit)
    template = DEFAULT_TEMPLATE if args.prompt_template is None else args.prompt_template.replace("\\n", "\n")
    return JsonlTask(args.data, seed=args.seed, template=template)


def task_config(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options that decide what is asked and how, for a study's configuration.

    The tokenizer, by which ``context_tokens`` counts, is the model's, whose fingerprint stands beside this.
    """
    args = _with_defaults(args)
    defaults = {"identifiers": None if args.data else _UUID, "depths": DEFAULT_DEPTHS,
                "prompt_template": escaped(DEFAULT_TEMPLATE)}  # fmt: skip
    own = {name: getattr(args, name) for name in sorted(_OPTIONS[args.task])}
    own |= {name: value for name, value in defaults.items() if name in own and own[name] is None}
    own["data"] = None if args.data is None else file_identity(args.data)
    return {
        "name": args.task,
        **own,
        "seed": args.seed,
        "answer_prefix": args.answer_prefix,
        "chat_template": not args.no_chat_template,
    }


def _with_defaults(args: argparse.Namespace) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_task_arguments(parser)
    return argparse.Namespace(**vars(parser.parse_args([])) | vars(args))


def escaped(text: str) -> str:
    """A text with its new lines as the command line takes them."""
    return text.replace("\n", "\\n")


def file_identity(path: Path | str) -> str:
    """Return a file's name and content's hash, not where it lies: a study may move.

    Raises:
        LropeError: the file cannot be read.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return f"{path.name} sha256:{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
    except OSError as error:
        raise LropeError(f"{path}: cannot be read ({error.strerror}); give another file") from None


def positive(text: str) -> int:
    """A whole number from 1, for argparse."""
    return _whole(text, 1)


def natural(text: str) -> int:
    """A whole number from 0, for argparse."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least}")
    return int(text)
