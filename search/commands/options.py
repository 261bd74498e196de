"""Options that the search commands share: the model, how it is run, and the task."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

from lrope_gguf.errors import LropeError

from ..model import Model
from ..tasks import DEFAULT_PAIRS, IDENTIFIERS, KeyValueTask, Task


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
    group.add_argument("--task", choices=["kv"], default="kv", help="kv: key-value retrieval (%(default)s)")
    group.add_argument(
        "--keys", metavar="N", type=positive, help=f"pairs a context ({DEFAULT_PAIRS}; with --data all of a record)"
    )
    group.add_argument("--data", metavar="FILE", help="kv-retrieval-*_keys.jsonl[.gz] (contexts made from the seed)")
    group.add_argument(
        "--identifiers",
        choices=IDENTIFIERS,
        default="uuid",
        help="what keys and values are; number: three and four digits, for small models (%(default)s)",
    )
    group.add_argument("--depths", metavar="N", type=positive, default=11, help="questions a context (%(default)s)")
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


def open_task(args: argparse.Namespace) -> Task:
    """Make the task of the options."""
    return KeyValueTask(args.keys, depths=args.depths, seed=args.seed, data=args.data, identifiers=args.identifiers)


def task_config(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options that decide what is asked and how, for a study's configuration."""
    return {
        "name": args.task,
        "keys": args.keys,
        "data": None if args.data is None else file_identity(args.data),
        "identifiers": args.identifiers,
        "depths": args.depths,
        "seed": args.seed,
        "answer_prefix": args.answer_prefix,
        "chat_template": not args.no_chat_template,
    }


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
