"""What ggml's operations compute, in torch: each takes a node and the values of its sources, in NumPy's order of axes.

Values are what ggml would have in float32; integers stay integers. What needs more than its sources (views, memory,
RoPE, attention) is in `replay`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch.nn import functional

from .attention import Scores
from .capture import Node

Tensor = Any
Operation = Callable[..., Tensor]


def like(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Repeat ``x`` along its axes up to ``shape``, as ggml broadcasts; axes of 1 are left to torch."""
    times = [n // m if m > 1 else 1 for n, m in zip(shape, x.shape, strict=True)]
    return x.repeat(times) if max(times) > 1 else x


def _binary(function: Operation) -> Operation:
    return lambda node, a, b: function(a, like(b, a.shape))


def _mul_mat(node: Node, a: Tensor, b: Tensor) -> Tensor:
    if a.shape[0] == a.shape[1] == 1:
        return functional.linear(b, a[0, 0])
    for axis in (0, 1):
        a = a.repeat_interleave(b.shape[axis] // a.shape[axis], axis)
    return b @ a.transpose(-1, -2)


def _mul_mat_id(node: Node, a: Tensor, b: Tensor, ids: Tensor) -> Tensor:
    """Each token's rows times the matrices of its experts: a (1, experts, m, k), b (1, tokens, used or 1, k)."""
    chosen = ids[0, 0]
    rows = b[0].expand(-1, chosen.shape[1], -1)
    out = rows.new_zeros(*chosen.shape, a.shape[2])
    for expert in torch.unique(chosen).tolist():
        where = torch.nonzero(chosen == expert, as_tuple=True)
        out = out.index_put(where, functional.linear(rows[where], a[0, expert]))
    return out[None]


def _get_rows(node: Node, a: Tensor, ids: Tensor) -> Tensor:
    _, i2, i1, i0 = ids.shape
    if a.shape[0] == a.shape[1] == 1:
        return a[0, 0][ids.reshape(-1)].reshape(i2, i1, i0, a.shape[3])
    table = a.reshape(i2 * i1, a.shape[2], a.shape[3])
    index = ids.reshape(i2 * i1, i0, 1).expand(-1, -1, a.shape[3])
    return table.gather(1, index).reshape(i2, i1, i0, a.shape[3])


def _rms_norm(node: Node, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + node.floats(1)[0])


def _norm(node: Node, x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], eps=node.floats(1)[0])


def _l2_norm(node: Node, x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt().clamp_min(node.floats(1)[0])


def _scale(node: Node, x: Tensor) -> Tensor:
    scale, bias = node.floats(2)
    return x * scale + bias if bias else x * scale


def _soft_max(node: Node, x: Tensor, mask: Tensor | None = None, sinks: Tensor | None = None) -> Tensor:
    """Scores of shape (streams, heads, queries, keys)."""
    scale, max_bias = node.floats(2)
    x = x * scale
    if mask is not None:
        mask = like(mask[..., : x.shape[2], :].to(x.dtype), x.shape)
        if max_bias:
            slopes = torch.tensor(Scores(scale, max_bias=max_bias).slopes(x.shape[1]), dtype=x.dtype, device=x.device)
            mask = torch.where(mask == -math.inf, mask, mask * slopes[:, None, None])
        x = x + mask
    if sinks is None:
        return torch.softmax(x, -1)
    column = sinks.reshape(1, -1, 1, 1).expand(x.shape[0], -1, x.shape[2], 1)
    return torch.softmax(torch.cat((x, column), -1), -1)[..., :-1]


def _halves(node: Node, a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
    if b is not None:
        return a, b
    x, y = a.chunk(2, -1)
    return (y, x) if node.ints(2)[1] else (x, y)


def _glu(function: Callable[[Tensor], Tensor]) -> Operation:
    def operation(node: Node, a: Tensor, b: Tensor | None = None) -> Tensor:
        x, y = _halves(node, a, b)
        return function(x) * y

    return operation


def _swiglu_oai(node: Node, a: Tensor, b: Tensor | None = None) -> Tensor:
    x, y = _halves(node, a, b)
    alpha, limit = node.floats(4)[2:]
    x = x.clamp(max=limit)
    return x * torch.sigmoid(alpha * x) * (y.clamp(-limit, limit) + 1.0)


def _swiglu_clamp(node: Node, a: Tensor, b: Tensor | None = None) -> Tensor:
    x, y = _halves(node, a, b)
    limit = node.floats(4)[3]
    return functional.silu(x.clamp(max=limit)) * y.clamp(-limit, limit)


def _gelu(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def _gelu_quick(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _xielu(node: Node, x: Tensor) -> Tensor:
    alpha_n, alpha_p, beta, eps = node.floats(5)[1:]
    below = (torch.expm1(x.clamp(max=eps)) - x) * alpha_n
    return torch.where(x > 0.0, alpha_p * x * x, below) + beta * x


def _unary(function: Callable[[Tensor], Tensor]) -> Operation:
    return lambda node, x: function(x)


def _concat(node: Node, a: Tensor, b: Tensor) -> Tensor:
    return torch.cat((a, b), 3 - node.ints(1)[0])


def _repeat(node: Node, a: Tensor, *_: Tensor) -> Tensor:
    return a.repeat([n // m for n, m in zip(node.shape, a.shape, strict=True)])


def _argsort(node: Node, x: Tensor) -> Tensor:
    return torch.argsort(x.detach(), dim=-1, descending=bool(node.ints(1)[0]), stable=True)


def _top_k(node: Node, x: Tensor) -> Tensor:
    return torch.topk(x.detach(), node.shape[3], -1).indices


def _add_id(node: Node, a: Tensor, b: Tensor, ids: Tensor) -> Tensor:
    return a + b[0, 0][ids[0, 0]][None]


def _clamp(node: Node, x: Tensor) -> Tensor:
    low, high = node.floats(2)
    return x.clamp(low, high)


def _fill(node: Node, x: Tensor) -> Tensor:
    return torch.full_like(x, node.floats(1)[0])


def _arange(node: Node) -> Tensor:
    start, _, step = node.floats(3)
    return (start + step * torch.arange(node.shape[3])).reshape(node.shape)


def _pad(node: Node, x: Tensor) -> Tensor:
    *sides, circular = node.ints(9)
    return functional.pad(x, sides, "circular" if circular else "constant")


def _group_norm(node: Node, x: Tensor) -> Tensor:
    groups, eps = node.ints(1)[0], node.floats(2)[1]
    return functional.group_norm(x, groups, eps=eps)


def _ssm_conv(node: Node, x: Tensor, weights: Tensor) -> Tensor:
    """Each channel along time: x (1, sequences, channels, tokens and those before), weights (1, 1, channels, width)."""
    out = functional.conv1d(x[0], weights[0, 0][:, None], groups=x.shape[2])
    return out.transpose(1, 2)[None]


OPERATIONS: Mapping[str, Operation] = MappingProxyType(
    {
        "MUL_MAT": _mul_mat,
        "MUL_MAT_ID": _mul_mat_id,
        "GET_ROWS": _get_rows,
        "ADD": _binary(torch.add),
        "SUB": _binary(torch.sub),
        "MUL": _binary(torch.mul),
        "DIV": _binary(torch.div),
        "ADD_ID": _add_id,
        "ADD1": _binary(torch.add),
        "RMS_NORM": _rms_norm,
        "NORM": _norm,
        "L2_NORM": _l2_norm,
        "GROUP_NORM": _group_norm,
        "SSM_CONV": _ssm_conv,
        "SCALE": _scale,
        "SOFT_MAX": _soft_max,
        "CONCAT": _concat,
        "REPEAT": _repeat,
        "SUM": lambda node, x: x.sum().reshape(1, 1, 1, 1),
        "SUM_ROWS": lambda node, x: x.sum(-1, keepdim=True),
        "MEAN": lambda node, x: x.mean(-1, keepdim=True),
        "CUMSUM": lambda node, x: x.cumsum(-1),
        "ARGSORT": _argsort,
        "TOP_K": _top_k,
        "CLAMP": _clamp,
        "FILL": _fill,
        "ARANGE": _arange,
        "PAD": _pad,
        "SQR": _unary(torch.square),
        "SQRT": _unary(torch.sqrt),
        "LOG": _unary(torch.log),
        "SIN": _unary(torch.sin),
        "COS": _unary(torch.cos),
        "ABS": _unary(torch.abs),
        "SGN": _unary(torch.sign),
        "NEG": _unary(torch.neg),
        "STEP": _unary(lambda x: (x > 0.0).to(x.dtype)),
        "TANH": _unary(torch.tanh),
        "ELU": _unary(functional.elu),
        "RELU": _unary(torch.relu),
        "SIGMOID": _unary(torch.sigmoid),
        "GELU": _unary(_gelu),
        "GELU_QUICK": _unary(_gelu_quick),
        "GELU_ERF": _unary(functional.gelu),
        "SILU": _unary(functional.silu),
        "EXP": _unary(torch.exp),
        "EXPM1": _unary(torch.expm1),
        "SOFTPLUS": _unary(functional.softplus),
        "HARDSWISH": _unary(functional.hardswish),
        "HARDSIGMOID": _unary(functional.hardsigmoid),
        "FLOOR": _unary(torch.floor),
        "CEIL": _unary(torch.ceil),
        "ROUND": _unary(torch.round),
        "TRUNC": _unary(torch.trunc),
        "XIELU": _xielu,
        "REGLU": _glu(torch.relu),
        "GEGLU": _glu(_gelu),
        "GEGLU_ERF": _glu(functional.gelu),
        "GEGLU_QUICK": _glu(_gelu_quick),
        "SWIGLU": _glu(functional.silu),
        "SWIGLU_OAI": _swiglu_oai,
        "SWIGLU_CLAMP": _swiglu_clamp,
    }
)
"""By ggml's names."""
