"""What the machine is and what it can do: the limit every table is read against."""

import platform
import re
import resource
import sys
import time
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """As a table should call it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [
            line.partition(":")[2].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        name = lines[0] if lines else name
    return f"{torch.get_num_threads()} cores of {name}"


def gemm_rate(
    device: torch.device, dtype: torch.dtype, rows: int, width: int, out: int, seconds: float = 2.0
) -> float:
    """FLOP/s of a matrix product (rows x width) (width x out), the best of some runs."""
    left = torch.randn(rows, width, device=device, dtype=dtype)
    right = torch.randn(out, width, device=device, dtype=dtype)
    best, begun = 0.0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        for _ in range(5):
            torch.nn.functional.linear(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 5 * 2 * rows * width * out / (time.perf_counter() - start))
    return best


def peak_memory(device: torch.device) -> float:
    """GB: of the device on CUDA, else the largest resident size of this process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would be at least what the process had that started this one
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024 / 1e9
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / 1e9 if sys.platform == "darwin" else size * 1024 / 1e9


def report(lines: list[str], out: Path | None) -> None:
    """Print a part of a table when it is known, and add it to a file, which a line that begins with one # begins."""
    text = "\n".join(lines) + "\n"
    print(text, flush=True)
    if out:
        with out.open("w" if text.startswith("# ") else "a") as file:
            file.write(text)
