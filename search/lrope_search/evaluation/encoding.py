"""Contexts in tokens: what all prompts share once, then each question with its gold answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..tasks.task import Context, Probe
from .batch import Part, Tokens
from .lead import Frame, Lead
from .model import Model

MAX_NEW_TOKENS = 100  # of a generated answer, as in the benchmark's scripts
_TIMES_LISTED = 3  # the right answer's tokens, of one with several parts: room for numbers and stars about each


@dataclass(frozen=True)
class Encoding:
    """A context in tokens.

    `tokens` and the arrays of its shape hold all probes' questions and gold answers (lead and value) in one row; an
    answer's last token predicts nothing, so it is not among them. Logits are `wanted` where a value's token must be
    predicted; a lead is fed and not scored, since rows of logits are dear where the vocabulary is large. `gold` and
    `owner` have one entry for each wanted position: the token that it must predict, and its probe.
    """

    prefix: Tokens
    questions: tuple[Tokens, ...]
    tokens: Tokens
    positions: NDArray[np.int64]
    sequences: NDArray[np.int64]
    wanted: NDArray[np.bool_]
    gold: Tokens
    owner: NDArray[np.int64]
    depths: tuple[float, ...]
    """Of the probes."""
    task: str
    """Its name, of a mix of several."""
    n_new: int = MAX_NEW_TOKENS
    """The most tokens of a generated answer."""

    @property
    def n_tokens(self) -> int:
        """Tokens to compute."""
        return len(self.prefix) + len(self.tokens)

    @property
    def length(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return int(self.positions.max()) + 2

    @property
    def n_seq(self) -> int:
        """Sequences: one for the prefix, one for each probe."""
        return 1 + len(self.questions)

    @property
    def n_cells(self) -> int:
        """Cells of the KV cache that scoring or generating takes."""
        return self.n_tokens + self.n_new * len(self.questions)

    @cached_property
    def n_bytes(self) -> int:
        """Memory that the arrays take."""
        arrays = [array for array in (*vars(self).values(), *self.questions) if isinstance(array, np.ndarray)]
        return sum(array.nbytes for array in arrays)

    def head(self) -> Part:
        """The prefix, shared by all sequences."""
        n = len(self.prefix)
        zeros = np.zeros(n, np.int64)
        return self.prefix, np.arange(n), zeros, np.zeros(n, np.bool_), zeros + self.n_seq

    def tail(self) -> Part:
        """The probes, each of a sequence of its own."""
        return self.tokens, self.positions, self.sequences, self.wanted, np.ones(len(self.tokens), np.int64)


class Encoder:
    """Puts contexts into a model's tokens, with the answers that the model is expected to write.

    Attributes:
        lead: What stands before each value; whoever knows better sets it.
        frame: Of the task's questions.
    """

    def __init__(self, model: Model, answer_prefix: str, frame: Frame) -> None:
        """Hold ``model``. ``answer_prefix`` begins each answer and is part of the prompt."""
        self._model = model
        self._answer_prefix = answer_prefix
        self.frame = frame
        self.lead = Lead("", own_tokens=True)

    def encode(self, context: Context) -> Encoding:
        """Return the context in tokens."""
        encoded = (self.encode_probe(context.prefix, probe) for probe in context.probes)
        prompts, leads, answers = zip(*encoded, strict=True)
        n_shared = min(_common_prefix(prompts), *(len(prompt) - 1 for prompt in prompts))  # each asks for a logit
        questions = tuple(prompt[n_shared:] for prompt in prompts)
        n_tail = np.array([len(q) + len(a) - 1 for q, a in zip(questions, answers, strict=True)])
        n_value = np.array([len(answer) - n for answer, n in zip(answers, leads, strict=True)])
        place = np.concatenate([np.arange(n) for n in n_tail])
        both = zip(answers, context.probes, strict=True)
        return Encoding(
            prefix=prompts[0][:n_shared],
            questions=questions,
            tokens=np.concatenate([np.append(q, a[:-1]) for q, a in zip(questions, answers, strict=True)]),
            positions=n_shared + place,
            sequences=np.repeat(np.arange(1, len(prompts) + 1), n_tail),
            wanted=place >= np.repeat(n_tail - n_value, n_tail),
            gold=np.concatenate([answer[n:] for answer, n in zip(answers, leads, strict=True)]),
            owner=np.repeat(np.arange(len(prompts)), n_value),
            depths=tuple(probe.depth for probe in context.probes),
            task=context.task,
            n_new=max([MAX_NEW_TOKENS, *(_TIMES_LISTED * len(a) for a, p in both if p.references)]),
        )

    def encode_probe(self, prefix: str, probe: Probe) -> tuple[Tokens, int, Tokens]:
        """Return the prompt's tokens, the number of the lead's, and those of lead and value."""
        question = prefix + probe.question
        prompt = self._model.tokenize_prompt(question, self._answer_prefix)

        def follow(text: str) -> Tokens:
            tokens = self._model.tokenize_prompt(question, self._answer_prefix + text)
            n = len(prompt)  # if prompt and text merge into one token, the model cannot write it
            return tokens[n:] if np.array_equal(tokens[:n], prompt) else self._model.tokenize(text)

        lead = self.lead.for_key(self.frame.key(probe))
        before, answer = follow(lead), follow(lead + probe.answer)
        n_lead = _common_prefix([before, answer])
        if self.lead.own_tokens and n_lead < len(before):
            n_lead, answer = len(before), np.append(before, self._model.tokenize(probe.answer))
        return prompt, n_lead, answer


def _common_prefix(texts: Sequence[Tokens]) -> int:
    """Length of the longest common prefix of token sequences."""
    n = min(map(len, texts))
    same = np.all([text[:n] == texts[0][:n] for text in texts], axis=0)
    return n if same.all() else int(same.argmin())
