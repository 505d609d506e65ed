"""Which device, and what it is good at."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from unlabeled.errors import UserError


def choose_device(text: str = "auto") -> torch.device:
    """The device a text names; "auto" is CUDA, then MPS, then the CPU.

    Raises:
        UserError: the device is unknown or not on this machine.
    """
    if text == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(text)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {text} is not on this machine; auto, cpu, cuda and mps may be") from error
    if device.type == "cuda" and ":" not in text:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return device


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products are faster than float32 ones there."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        if hasattr(torch.cpu, "get_capabilities"):
            capability = torch.cpu.get_capabilities()
            return any(capability.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16"))
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


@contextlib.contextmanager
def denormals_flushed() -> Iterator[None]:
    """Denormal numbers count as 0 on the CPU meanwhile: behind a LayerScale of 1e-5 the first gradients are such.

    CPUs are many times slower at them. What the process did with them before is put back at the end.
    """
    smallest = torch.finfo(torch.float32).tiny
    kept = bool(torch.tensor(smallest) * 0.5 > 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(not kept)
