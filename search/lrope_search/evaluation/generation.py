"""Answers that the model writes itself, side by side: what teacher forcing is checked by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lrope_gguf.errors import LropeError

from ..tasks.task import Probe
from .encoding import Encoding
from .model import Model


@dataclass(frozen=True)
class Generation:
    """A generated answer, and the ``share`` of the gold one that it contains, whatever the case: 0 to 1, of parts."""

    depth: float
    text: str
    share: float

    @property
    def correct(self) -> bool:
        """Whether the text contains all of the answer."""
        return self.share == 1.0


def write_answers(model: Model, encoding: Encoding, probes: Sequence[Probe]) -> list[list[int]]:
    """Return the tokens that greedy decoding writes after each question.

    Sequence 0 holds the prefix already, sequence ``1 + i`` becomes a copy of it for probe ``i``. An answer ends at the
    model's end token, after 100 tokens (`Encoding.n_new`), or as soon as it is right: later text cannot change its
    score. Raises `LropeError`: the logits are NaN.
    """
    for sequence in range(1, encoding.n_seq):
        model.copy_sequence(0, sequence)
    written: list[list[int]] = [[] for _ in probes]
    lengths = np.array([len(question) for question in encoding.questions])
    tokens = np.concatenate(encoding.questions)
    positions = len(encoding.prefix) + np.concatenate([np.arange(n) for n in lengths])
    sequences = np.repeat(np.arange(1, len(probes) + 1), lengths)
    wanted = np.zeros(len(tokens), np.bool_)
    wanted[np.cumsum(lengths) - 1] = True
    for _ in range(encoding.n_new):
        chosen = np.empty(np.count_nonzero(wanted), np.int32)
        for rows, logits in model.decode(tokens, positions, sequences, wanted):
            chosen[rows] = logits.argmax(axis=1)
            if np.isnan(logits.max(axis=1)).any():
                listed = ",".join(f"{factor:g}" for factor in model.get_factors())
                model.clear(data=True)
                raise LropeError(f"{model.path}: its logits are NaN with factors {listed}; the file may be damaged")
        tokens, positions, sequences = chosen, positions[wanted] + 1, sequences[wanted]
        going = np.ones(len(tokens), np.bool_)
        for i, (token, sequence) in enumerate(zip(tokens.tolist(), sequences.tolist(), strict=True)):
            answer = written[sequence - 1]
            if model.is_end(token):
                going[i] = False
                continue
            answer.append(token)
            going[i] = not probes[sequence - 1].answered_by(model.text(answer))
        tokens, positions, sequences = tokens[going], positions[going], sequences[going]
        if not len(tokens):
            break
        wanted = np.ones(len(tokens), np.bool_)
    return written
