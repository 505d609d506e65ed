"""Which device, and what it is good at."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
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


@contextlib.contextmanager
def tuned_for(device: torch.device) -> Iterator[None]:
    """The process is set up for training on a device meanwhile: see `denormals_flushed` and `keep_freed_memory`."""
    if device.type == "cpu":
        keep_freed_memory()
    with denormals_flushed():
        yield


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """torch's operations take one thread each meanwhile: for threads that each run a batch of their own.

    Two such threads run 1.2 times as many images on two cores as one whose operations are divided, which ends each of
    them with a wait. May be entered by several threads at once; the number from before is put back by the last.
    """
    global _inside, _threads_before
    with _entering:
        if _inside == 0:
            _threads_before = torch.get_num_threads()
            torch.set_num_threads(1)
        _inside += 1
    try:
        yield
    finally:
        with _entering:
            _inside -= 1
            if _inside == 0:
                torch.set_num_threads(_threads_before)


_entering = threading.Lock()
_inside, _threads_before = 0, 1


def keep_freed_memory() -> bool:
    """Let the C library hand freed memory out again, rather than return it to the system; whether it can.

    glibc unmaps each block over 32 MB when it is freed, and the system then clears the pages of the next one: a
    fifth of the time of a training step or an extraction on a CPU. Of the whole process, from now on; its resident
    size stays at its highest. Elsewhere than on Linux with glibc nothing is changed.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    trim_threshold, most_mapped = -1, -4  # mallopt(3)
    return bool(library.mallopt(trim_threshold, 2**31 - 1)) and bool(library.mallopt(most_mapped, 0))
