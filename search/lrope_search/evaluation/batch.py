"""Tokens on their way into llama.cpp, and logits on their way out."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .binding import pointer

Tokens = NDArray[np.int32]
Logits = NDArray[np.float32]

MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ, llama-cparams.h

Part = tuple[Tokens, NDArray[Any], NDArray[Any], NDArray[np.bool_], NDArray[Any]]
"""Of what is decoded: tokens, positions, first sequences, which logits are wanted, numbers of sequences."""
Scores = tuple[slice, NDArray[np.float32], NDArray[np.bool_]]
"""Of one decoded batch: which of the wanted rows these are, of each row's token the natural log-probability, NaN where
the logits are no numbers, and whether no other token is more likely."""


class Rows(NamedTuple):
    """Of one decoded batch: which of the wanted rows these are, and their logits, shape (rows, n_vocab).

    The logits are llama.cpp's own buffer, free to be overwritten, valid until the next decode.
    """

    rows: slice
    logits: Logits


class Batch:
    """A ``llama_batch`` on NumPy arrays that are filled in place; a token's sequences are consecutive ones of all."""

    def __init__(self, llama: Any, size: int) -> None:
        self.token, self.pos, self.n_seq = (np.zeros(size, np.int32) for _ in range(3))
        self.logits = np.zeros(size, np.int8)
        self.target = np.zeros(size, np.int32)
        self._all = np.arange(MAX_SEQUENCES, dtype=np.int32)
        self._pointer_of = self._all.ctypes.data + self._all.itemsize * np.arange(MAX_SEQUENCES, dtype=np.uintp)
        self._pointers = np.zeros(size, np.uintp)
        self.struct = llama.llama_batch(
            n_tokens=0,
            token=pointer(self.token, llama.llama_token),
            pos=pointer(self.pos, llama.llama_pos),
            n_seq_id=pointer(self.n_seq, ctypes.c_int32),
            seq_id=pointer(self._pointers, ctypes.POINTER(llama.llama_seq_id)),
            logits=pointer(self.logits, ctypes.c_int8),
        )

    def set_sequences(self, first: NDArray[Any], n_seq: NDArray[Any] | int) -> None:
        """Say to which sequences the first tokens belong: ``n_seq`` of them from ``first`` on."""
        self._pointers[: len(first)] = self._pointer_of[first]
        self.n_seq[: len(first)] = n_seq
