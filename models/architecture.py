"""The embedded model in PyTorch, exactly as llama.cpp computes its architecture "llama"."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from vocabulary import N_VOCAB

N_LAYER, N_EMBD, N_FF = 4, 96, 128
N_HEAD, N_HEAD_KV, N_ROT = 4, 2, 24
ROPE_BASE, NORM_EPSILON = 10000.0, 1e-5
N_CTX = 512  # tokens that it may be asked for: `llama-server` refuses more than a model's context length

BLOCK_NAMES = {
    "attention_norm": "attn_norm",
    "attention.q": "attn_q",
    "attention.k": "attn_k",
    "attention.v": "attn_v",
    "attention.output": "attn_output",
    "ffn_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
"""The weights of a block by their names in GGUF."""


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al., arXiv 2305.13245) with RoPE (Su et al., arXiv 2104.09864).

    RoPE turns pairs of neighbouring dimensions, llama.cpp's mode "normal".
    """

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(N_EMBD, N_HEAD * N_ROT, bias=False)
        self.k = nn.Linear(N_EMBD, N_HEAD_KV * N_ROT, bias=False)
        self.v = nn.Linear(N_EMBD, N_HEAD_KV * N_ROT, bias=False)
        self.output = nn.Linear(N_HEAD * N_ROT, N_EMBD, bias=False)

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor) -> Tensor:
        """Attend.

        Args:
            x: Shape (batch, n, N_EMBD).
            rotation: Shape (n, N_ROT / 2), complex.
            mask: Shape (n, n), true where a token (row) sees another (column).
        """
        batch, n, _ = x.shape
        q = _rotate(self.q(x).view(batch, n, N_HEAD, N_ROT), rotation)
        k = _rotate(self.k(x).view(batch, n, N_HEAD_KV, N_ROT), rotation)
        v = self.v(x).view(batch, n, N_HEAD_KV, N_ROT)
        k, v = (t.repeat_interleave(N_HEAD // N_HEAD_KV, dim=2).transpose(1, 2) for t in (k, v))
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask)
        return self.output(y.transpose(1, 2).reshape(batch, n, N_HEAD * N_ROT))


class Block(nn.Module):
    """Attention, then SwiGLU (Shazeer, arXiv 2002.05202), each behind RMSNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(N_EMBD, eps=NORM_EPSILON)
        self.attention = Attention()
        self.ffn_norm = nn.RMSNorm(N_EMBD, eps=NORM_EPSILON)
        self.gate = nn.Linear(N_EMBD, N_FF, bias=False)
        self.up = nn.Linear(N_EMBD, N_FF, bias=False)
        self.down = nn.Linear(N_FF, N_EMBD, bias=False)

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor) -> Tensor:
        """As `Attention.forward`."""
        x = x + self.attention(self.attention_norm(x), rotation, mask)
        h = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    """The whole model."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(N_VOCAB, N_EMBD)
        self.blocks = nn.ModuleList(Block() for _ in range(N_LAYER))
        self.norm = nn.RMSNorm(N_EMBD, eps=NORM_EPSILON)
        self.head = nn.Linear(N_EMBD, N_VOCAB, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                into_stream = name.endswith(("down.weight", "output.weight"))
                std = (
                    1.0 if weight is self.embedding.weight else (0.5 if into_stream else 1.0) * weight.shape[1] ** -0.5
                )
                nn.init.normal_(weight, std=std)

    def forward(
        self, tokens: Tensor, positions: Tensor, mask: Tensor, *, first: int = 0, factors: Sequence[float] = ()
    ) -> Tensor:
        """Logits of the tokens from index ``first``, shape (batch, n - first, N_VOCAB).

        Args:
            tokens: Shape (batch, n).
            positions: Shape (n,).
            mask: See `Attention.forward`.
            first: Index of the first token to give logits of.
            factors: Layer factors, 1 if none.
        """
        frequencies = ROPE_BASE ** (-torch.arange(0, N_ROT, 2, dtype=torch.float64) / N_ROT)
        x = self.embedding(tokens)
        for block, factor in zip(self.blocks, factors or [1.0] * N_LAYER, strict=True):
            angles = positions[:, None] / factor * frequencies
            x = block(x, torch.polar(torch.ones_like(angles), angles).to(torch.complex64), mask)
        logits: Tensor = self.head(self.norm(x[:, first:]))
        return logits


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], N_ROT // 2, 2))
    return torch.view_as_real(pairs * rotation[:, None, :]).flatten(-2)
