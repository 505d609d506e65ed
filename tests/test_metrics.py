"""Rows of figures, and what happens when they cannot be written."""

import resource
from pathlib import Path

import pytest

from unlabeled.errors import UserError
from unlabeled.metrics import Metrics


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_is_said_once(tmp_path: Path) -> None:
    """TensorBoard writes in a thread, which has an error of its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with (
            pytest.raises(UserError, match=r"cannot be written: File too large"),
            Metrics(tmp_path, 0, True) as metrics,
        ):
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
            while True:
                metrics.add({"step": 0, "loss": 1.0})
                (tmp_path / "metrics.jsonl").write_text("")  # only TensorBoard's file grows
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
