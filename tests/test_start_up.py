"""What is typed for a glance must not wait for torch."""

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "cv2", "pyarrow", "faiss", "sklearn", "matplotlib")
RUN = f"""
import sys
from unlabeled.cli import main
sys.argv[0] = "unlabeled"
try:
    main()
finally:
    print("loaded:", *(name for name in {HEAVY!r} if name in sys.modules), file=sys.stderr)
"""


@pytest.mark.parametrize("words", [["--help"], ["pretrain", "--help"], ["info"], ["info", "--json"]])
def test_heavy_libraries_are_not_loaded(words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", RUN, *words], capture_output=True, text=True, check=True)
    assert done.stderr.split("loaded:")[1].split() == []
    if "--json" in words:
        assert json.loads(done.stdout)["model.patch_size"]["vitl16_short"] == 16
