"""The base model's answer to an easy question, shown where it answers none of the others right."""

from __future__ import annotations

from dataclasses import dataclass

from lrope_gguf.text import printable

_SHOWN = 60  # characters


@dataclass(frozen=True)
class Sample:
    """An easy question of a task: the end of its prompt as the model sees it, the right answer, and what it wrote.

    ``chat``: whether the prompt went through a chat template. ``listed``: whether the answer has several parts.
    """

    prompt_end: str
    answer: str
    written: str
    chat: bool
    listed: bool = False

    def advice(self, n_questions: int) -> str:
        """Say what to look at where the base model answers none of ``n_questions`` right."""
        none = f"answers none of {n_questions} questions right, so that no gain can show"
        if self.listed:
            none = f"writes none of {n_questions} lists exactly, so that accuracy shows no gain without eval --generate"
        told = (
            f"the base model {none}; the prompt of an easy one ends in {_quoted(self.prompt_end[-_SHOWN:])}, the "
            f"answer is {_quoted(self.answer)}, and it writes {_quoted(self.written[:_SHOWN])}"
        )
        _, opened, rest = self.prompt_end.rpartition("<think>")
        if opened and "</think>" not in rest:
            return f"{told}. Its chat template opens <think>: close it with --set TASK.answer_prefix='</think>'"
        way = "--set chat_template=false" if self.chat else "--set TASK.answer_prefix=TEXT"
        return f"{told}. Try {way}, or shorter contexts, and read what it writes with eval --generate"


def _quoted(text: str) -> str:
    return "'" + printable(text.replace("\n", "\\n"), 4 * _SHOWN) + "'"
