"""Several groups of images in one pass of the backbone: the same numbers as a pass each."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.test_vit import TINY, randomised
from unlabeled.packing import cut, joined
from unlabeled.vit import VisionTransformer


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 7)), min_size=1, max_size=4))
def test_cut_is_the_inverse_of_joined(shapes: list[tuple[int, int]]) -> None:
    groups = [torch.randn(*shape, 3) for shape in shapes]
    packed = joined(groups)
    assert packed.numel() == sum(group.numel() for group in groups)
    for found, group in zip(cut(packed, tuple(shapes)), groups, strict=True):
        assert torch.equal(found, group)
        assert found.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()


def passes(
    model: VisionTransformer, groups: list[tuple[Tensor, Tensor | None]], packed: bool
) -> list[Tensor | None]:
    """All tokens of all groups, and the gradients of a weighted sum of them; the same random numbers each time."""
    torch.manual_seed(7)
    model.zero_grad()
    found = model.all_tokens(groups) if packed else [model(*group) for group in groups]
    tokens = [part for one in found for part in (one.cls, one.registers, one.patches)]
    weights = torch.Generator().manual_seed(3)
    loss = sum(
        (part.double() * torch.randn(part.shape, generator=weights, dtype=torch.float64)).sum()
        for part in tokens
    )
    loss.backward()  # type: ignore[union-attr]
    return [*tokens, *(parameter.grad for parameter in model.parameters())]


group_sizes = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.booleans())


@settings(max_examples=40, deadline=None)
@given(
    groups=st.lists(group_sizes, min_size=1, max_size=3),
    rate=st.sampled_from([0.0, 0.1, 0.3, 0.6]),
    ffn=st.sampled_from(["mlp", "swiglu"]),
    registers=st.sampled_from([0, 3]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_packed_is_one_pass_each(
    groups: list[tuple[int, int, int, bool]], rate: float, ffn: str, registers: int, dtype: torch.dtype
) -> None:
    model = randomised(replace(TINY, ffn=ffn, num_registers=registers), drop_path=rate).train().to(dtype)
    given_groups = [
        (torch.randn(B, 3, 4 * h, 4 * w, dtype=dtype), torch.rand(B, h * w) < 0.4 if masked else None)
        for B, h, w, masked in groups
    ]
    near = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 2e-3, "atol": 2e-3}
    torch.testing.assert_close(
        passes(model, given_groups, packed=True), passes(model, given_groups, packed=False), **near
    )


RANDOM = torch.Generator().manual_seed(0)
TWO_GROUPS = [
    (torch.randn(4, 3, 16, 16, generator=RANDOM), None),
    (torch.randn(3, 3, 32, 32, generator=RANDOM), torch.rand(3, 64, generator=RANDOM) < 0.3),
]


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5])
def test_packed_blocks_that_run_again_give_the_same_gradients(rate: float) -> None:
    model = randomised(TINY, drop_path=rate).train()
    plain = passes(model, TWO_GROUPS, packed=True)
    model.checkpoint_blocks = True
    for found, expected in zip(passes(model, TWO_GROUPS, packed=True), plain, strict=True):
        assert torch.equal(found, expected)  # type: ignore[arg-type]


def test_packed_in_bf16() -> None:
    model = randomised(TINY, drop_path=0.3).train()
    with torch.autocast("cpu", torch.bfloat16):
        packed, apart = (passes(model, TWO_GROUPS, packed=packed) for packed in (True, False))
    for found, expected in zip(packed, apart, strict=True):
        assert found is not None and expected is not None
        assert found.dtype == expected.dtype == torch.float32
        assert (found - expected).norm() <= 0.02 * expected.norm()


class Products(TorchDispatchMode):
    """How many matrix products with weights are run."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
        self.count += function.overloadpacket.__name__ in ("addmm", "mm", "linear")
        return function(*arguments, **(options or {}))


def test_layers_run_once_for_all_groups() -> None:
    model = randomised(TINY)
    for groups in (TWO_GROUPS[:1], TWO_GROUPS):
        with Products() as products, torch.no_grad():
            model.all_tokens(groups)
        grids = sum(images.shape[-1] != TINY.image_size for images, _ in groups)
        assert (
            products.count == 4 * TINY.depth + grids
        )  # one of the position embedding's two is no plain product
