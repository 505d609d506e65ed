"""What the process is told about its processor: threads, and memory that was freed."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from unlabeled.devices import one_thread_each

# Which share of 64 MB the system has to clear each time they are allocated; the first times the heap still grows.
FAULTS = """
import resource, sys, torch
from unlabeled.devices import keep_freed_memory
if "keep" in sys.argv and not keep_freed_memory():
    print("cannot"); sys.exit()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.empty(2**24).zero_()
before = faults()
for _ in range(5):
    torch.empty(2**24).zero_()
print((faults() - before) * resource.getpagesize() / (5 * 2**26))
"""


def faults(*arguments: str) -> str:
    run = [sys.executable, "-c", FAULTS, *arguments]
    return subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip()


def test_freed_memory_is_used_again() -> None:
    kept = faults("keep")
    if kept == "cannot":
        pytest.skip("this system's C library has no such option")
    assert float(kept) < 0.01
    assert float(faults()) > 0.9  # else the option has no effect on this system, and should go


def test_one_thread_each_is_put_back_by_the_last_of_several() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    both, first_out = threading.Barrier(2), threading.Event()

    def hold(is_last: bool) -> int:
        with one_thread_each():
            both.wait()
            if is_last:
                first_out.wait()
            seen = torch.get_num_threads()
        first_out.set()
        return seen

    try:
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(hold, (True, False))) == [1, 1]
        # A thread that uses torch for the first time has the process's number.
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 3
        with pytest.raises(RuntimeError, match="inside"), one_thread_each():
            raise RuntimeError("inside")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
