"""Two steps of a transformer block that keep less for the gradient than plain autograd does.

What is left out is computed anew in the backward pass, at a small part of its cost; the numbers are the same.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

# Attention weights held at once, in elements: about what the processor's cache holds in bfloat16.
WEIGHTS_AT_ONCE = 2**19


def gelu_linear(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return gelu(hidden) weight^T + bias; the output of GELU, as large as its input, is not kept.

    hidden: (..., K). weight: (D, K). bias: (D,). The product is in hidden's dtype.
    """
    weight, bias = weight.to(hidden.dtype), bias.to(hidden.dtype)
    out = _GeluLinear.apply(hidden, weight, bias)  # type: ignore[no-untyped-call]
    return cast(Tensor, out)


class _GeluLinear(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return functional.linear(functional.gelu(hidden), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_weight = rows.T @ functional.gelu(hidden).flatten(0, -2)
        grad_hidden = torch.ops.aten.gelu_backward((rows @ weight).view_as(hidden), hidden)
        return grad_hidden, grad_weight, rows.sum(0)


def packed_attention(qkv_BT3Hd: Tensor) -> Tensor:
    """Return softmax(query key^T / sqrt(d)) value, (B, T, H * d), by plain products, a few samples at a time.

    qkv: (B, T, 3, H, d). Neither pass holds the T x T weights of the whole batch.
    """
    return cast(Tensor, _PackedAttention.apply(qkv_BT3Hd))  # type: ignore[no-untyped-call]


class _PackedAttention(Function):
    @staticmethod
    def forward(ctx: Any, qkv_BT3Hd: Tensor) -> Tensor:
        B, T, _, H, d = qkv_BT3Hd.shape
        packed_3BHTd = qkv_BT3Hd.permute(2, 0, 3, 1, 4).clone(memory_format=torch.contiguous_format)
        query, key, value = packed_3BHTd
        query.mul_(d**-0.5)
        mixed_BHTd = torch.empty_like(value)
        for part in _parts(B, H, T):
            weights = (query[part] @ key[part].mT).softmax(dim=-1)
            torch.matmul(weights, value[part], out=mixed_BHTd[part])
        ctx.save_for_backward(packed_3BHTd)
        return mixed_BHTd.transpose(1, 2).reshape(B, T, H * d)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTD: Tensor) -> Tensor:
        (packed_3BHTd,) = ctx.saved_tensors
        query, key, value = packed_3BHTd
        B, H, T, d = query.shape
        grad_BHTd = grad_BTD.reshape(B, T, H, d).transpose(1, 2).contiguous()
        out_3BHTd = torch.empty_like(packed_3BHTd)
        for part in _parts(B, H, T):
            weights = (query[part] @ key[part].mT).softmax(dim=-1)
            torch.matmul(weights.mT, grad_BHTd[part], out=out_3BHTd[2, part])
            grad_weights = grad_BHTd[part] @ value[part].mT
            grad_logits = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            torch.matmul(grad_logits, key[part], out=out_3BHTd[0, part])
            torch.matmul(grad_logits.mT, query[part], out=out_3BHTd[1, part])
        out_3BHTd[0].mul_(d**-0.5)
        return out_3BHTd.permute(1, 3, 0, 2, 4).contiguous()


def _parts(B: int, H: int, T: int) -> list[slice]:
    step = max(1, WEIGHTS_AT_ONCE // (H * T * T))
    return [slice(start, start + step) for start in range(0, B, step)]
