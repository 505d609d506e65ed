"""Runs of a tiny model as real processes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TINY = {
    "model.width": 24,
    "model.depth": 2,
    "model.num_heads": 2,
    "model.patch_size": 8,
    "model.layer_scale": 0.1,
    "head.num_prototypes": 32,
    "head.hidden": 32,
    "head.bottleneck": 8,
    "crops.global_size": 32,
    "crops.local_size": 16,
    "crops.num_locals": 2,
    "run.batch_size": 8,
    "run.precision": "float32",
    "run.workers": 0,
}


def command(
    *arguments: str,
    overrides: dict[str, Any] | None = None,
    ranks: int = 0,
    restarts: int = 0,
    name: str = "pretrain",
) -> list[str]:
    has_own_model = "--resume" in arguments or "--from" in arguments
    fields = (overrides or {}) if has_own_model else TINY | (overrides or {})
    options = [text for name, value in fields.items() for text in (f"--{name}", str(value))]
    start = [sys.executable, "-m"]
    if ranks:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        start += ["--max-restarts", str(restarts), "-m"]
    return [*start, "unlabeled", name, *arguments, *options]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


Runner = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run_pretrain() -> Runner:
    """Run the command to its end."""

    def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        line = command(*arguments, **options)
        return subprocess.run(line, capture_output=True, text=True, env=environment(), timeout=300)

    return run


def losses(folder: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows]
