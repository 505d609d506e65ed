"""The two lean steps against plain autograd, and what they keep."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import unlabeled.lean
from unlabeled.lean import gelu_linear, packed_attention


def plain_attention(qkv: Tensor) -> Tensor:
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    weights = (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(-1)
    return (weights @ value).transpose(1, 2).flatten(2)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 5),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(1, 8),
    st.sampled_from([1, 100, 2**19]),
)
def test_packed_attention(B: int, T: int, H: int, d: int, at_once: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unlabeled.lean, "WEIGHTS_AT_ONCE", at_once)
        torch.manual_seed(B + T)
        qkv = torch.randn(B, T, 3, H, d, dtype=torch.float64, requires_grad=True)
        ours, theirs = packed_attention(qkv), plain_attention(qkv)
        torch.testing.assert_close(ours, theirs)
        weights = torch.randn_like(ours)
        (grad,) = torch.autograd.grad((ours * weights).sum(), qkv)
        torch.testing.assert_close(grad, torch.autograd.grad((theirs * weights).sum(), qkv)[0])


def test_gradients_by_differences() -> None:
    torch.manual_seed(0)
    qkv = torch.randn(2, 4, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(packed_attention, qkv)
    hidden, weight, bias = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 6), (4, 6), (4,))
    )
    assert torch.autograd.gradcheck(gelu_linear, (hidden, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_linear_is_plain_autograd(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 5, 16, dtype=dtype, requires_grad=True)
    weight, bias = torch.randn(8, 16, requires_grad=True), torch.randn(8, requires_grad=True)
    grads = []
    for function in (gelu_linear, lambda h, w, b: functional.linear(functional.gelu(h), w, b)):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = function(hidden, weight, bias)
        assert out.dtype == dtype
        grads.append([out, *torch.autograd.grad(out.square().sum(), (hidden, weight, bias))])
    for ours, theirs in zip(*grads, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs)


def test_packed_attention_in_bfloat16() -> None:
    torch.manual_seed(0)
    qkv = torch.randn(3, 50, 3, 2, 16, requires_grad=True)
    near = packed_attention(qkv.bfloat16())
    exact = plain_attention(qkv)
    torch.testing.assert_close(near.float(), exact, atol=0.03, rtol=0.03)
    weights = torch.randn_like(exact)
    (ours,) = torch.autograd.grad((near.float() * weights).sum(), qkv)
    (theirs,) = torch.autograd.grad((exact * weights).sum(), qkv)
    assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_what_is_kept() -> None:
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    qkv = torch.randn(2, 64, 3, 2, 4, requires_grad=True)
    hidden = torch.randn(32, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        packed_attention(qkv)
        assert kept == [qkv.numel()]
        kept.clear()
        gelu_linear(hidden, torch.randn(8, 64), torch.randn(8))
        assert sum(kept) == 32 * 64 + 8 * 64
