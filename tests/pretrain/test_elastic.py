"""A rank that is lost under torchrun: the others and a new one go on by themselves."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.pretrain.conftest import command, environment, losses
from tests.pretrain.test_resume import run_here
from unlabeled.pretrain import checkpoint

STEPS = {"run.steps": 12, "run.checkpoint_every": 3}


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the rank in /proc")
def test_a_killed_rank_comes_back_and_training_goes_on(tile_folder: Path, tmp_path: Path) -> None:
    arguments = (str(tile_folder), "--recipe", "tiny", "--device", "cpu")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_here(tile_folder, whole, overrides=STEPS)
    line = command(*arguments, "--out", str(broken), overrides=STEPS, ranks=2, restarts=1)
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(line, env=environment(), stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if len(checkpoint.all_checkpoints(broken / "checkpoints")) >= 2:
                break
            time.sleep(0.005)
        os.kill(rank_of(process.pid, 1), signal.SIGKILL)
        assert process.wait(timeout=240) == 0, (tmp_path / "log").read_text()
    assert "resumed from step" in (tmp_path / "log").read_text()
    # Without drop path, which depends on the number of ranks, two give the losses of one to rounding.
    expected = [loss for _, loss in losses(whole)]
    assert [loss for _, loss in losses(broken)] == pytest.approx(expected, rel=2e-4)
    assert [step for step, _ in losses(broken)] == list(range(12))


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks in /proc")
def test_ranks_stop_when_torchrun_is_killed(tile_folder: Path, tmp_path: Path) -> None:
    steps = {"run.steps": 100_000, "run.checkpoint_every": 100_000}
    run = tmp_path / "run"
    arguments = (str(tile_folder), "--recipe", "tiny", "--device", "cpu", "--out", str(run))
    with (tmp_path / "log").open("w") as log:
        line = command(*arguments, overrides=steps, ranks=2)
        process = subprocess.Popen(line, env=environment(), stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or len(losses(run)) < 2:
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.05)
        ranks = [rank_of(process.pid, number) for number in (0, 1)]
        process.kill()
        process.wait()
        while left := [rank for rank in ranks if is_running(rank)]:
            if time.monotonic() > deadline:
                for rank in left:
                    os.kill(rank, signal.SIGKILL)
                pytest.fail(f"{len(left)} ranks train on: {(tmp_path / 'log').read_text()}")
            time.sleep(0.1)
    assert len(checkpoint.all_checkpoints(run / "checkpoints")) == 1  # as after any SIGTERM
    assert "--resume" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (["DATA", "--out", "OUT", "--optimizer.lrr", "1"], "did you mean optimizer.lr?"),
        (["DATA", "--outt", "OUT"], "No such option: --outt"),
        (["--out", "OUT"], "no images were given"),
        (["OUT/none", "--out", "OUT"], "OUT/none"),
    ],
    ids=["field", "option", "no DATA", "no such DATA"],
)
def test_a_mistake_is_told_once(mistake: list[str], said: str, tile_folder: Path, tmp_path: Path) -> None:
    places = {"DATA": str(tile_folder), "OUT": str(tmp_path)}
    for name, place in places.items():
        mistake, said = [word.replace(name, place) for word in mistake], said.replace(name, place)
    start = command(ranks=2)
    line = [*start[: start.index("pretrain") + 1], *mistake, "--device", "cpu"]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    told = [line for line in done.stderr.splitlines() if line.startswith("unlabeled:")]
    assert len(told) == 1
    assert said in told[0]


def test_what_only_one_rank_finds_is_told_by_it(tmp_path: Path) -> None:
    script = "from unlabeled import cli; cli.ALONE = 0.1; cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "pretrain", "--nonsense"],
        env=environment() | {"TORCHELASTIC_RUN_ID": "a", "RANK": "3"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("unlabeled: rank 3: No such option: --nonsense")


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def rank_of(torchrun: int, number: int) -> int:
    """The process of a rank among the children of torchrun."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended meanwhile
            continue
        if parent == torchrun and f"RANK={number}".encode() in variables:
            return int(folder.name)
    raise AssertionError(f"rank {number} is not there")
