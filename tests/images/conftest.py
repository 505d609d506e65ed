"""What the tests of images share."""

import io
import subprocess
import sys
import tarfile
from collections.abc import Callable

import pytest

# A process's own high-water mark: ru_maxrss would start from that of the process it was forked from.
_PEAK = """
import sys
def peak():
    if sys.platform == "darwin":
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith("VmHWM")).split()[1])
"""


@pytest.fixture
def grown_by() -> Callable[..., int]:
    """Runs `prepare`, then `work`, in a new process; by how many kB `work` made its peak memory grow."""

    def run(prepare: str, work: str, *arguments: str) -> int:
        script = f"{_PEAK}\n{prepare}\nbefore = peak()\n{work}\nprint(peak() - before)"
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
        return int(done.stdout)

    return run


@pytest.fixture
def tar_member() -> Callable[[tarfile.TarFile, str, bytes], None]:
    """Adds a file to an archive."""

    def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))

    return add
