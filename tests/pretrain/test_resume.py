"""Runs that are killed, stopped, out of disk or out of numbers."""

import json
import random
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.pretrain.conftest import TINY, Runner, command, environment, losses
from unlabeled.errors import UserError
from unlabeled.images.decode import decode
from unlabeled.pretrain import checkpoint, loop
from unlabeled.pretrain.method import SelfDistillation
from unlabeled.pretrain.recipe import override
from unlabeled.pretrain.recipes import named_recipe

STEPS = {"run.steps": 30, "run.checkpoint_every": 3, "run.health_every": 5, "model.drop_path": 0.2}
QUIET = Console(quiet=True)


def run_here(data: Path, out: Path, **options: Any) -> loop.Run:
    overrides = TINY | {"run.steps": 6} | options.pop("overrides", {})
    return loop.pretrain(
        data, out, recipe="tiny", overrides=overrides, device="cpu", console=QUIET, **options
    )


def test_killed_at_any_moment_and_resumed_gives_the_same_losses(tile_folder: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_here(tile_folder, whole, overrides=STEPS | {"run.workers": 1})
    first = command(
        str(tile_folder), "--recipe", "tiny", "--device", "cpu", "--out", str(broken), overrides=STEPS
    )
    again = [*first[:4], "--resume", str(broken), "--device", "cpu"]
    moments = random.Random(0)
    for number, rows in enumerate((2, 10, 19)):
        line = again if checkpoint.all_checkpoints(broken / "checkpoints") else first
        process = subprocess.Popen(
            line, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and count_rows(broken) < rows and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.05))  # in a step, in the writing of a row, in that of a checkpoint
        process.kill()
        process.wait()
        assert count_rows(broken) >= rows, f"kill {number} came too early"
    loop.pretrain(resume=broken, device="cpu", console=QUIET)
    assert losses(broken) == losses(whole)
    assert len(losses(broken)) == 30


def count_rows(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_writes_a_checkpoint_and_says_how_to_go_on(
    tile_folder: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    out = tmp_path / "run"
    overrides = {"run.steps": 100_000, "run.checkpoint_every": 100_000, "run.workers": 1}
    line = command(
        str(tile_folder), "--recipe", "tiny", "--device", "cpu", "--out", str(out), overrides=overrides
    )
    process = subprocess.Popen(
        line, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    while process.poll() is None and count_rows(out) < 3:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert f"unlabeled pretrain --resume {out}" in errors
    assert "Traceback" not in errors
    (saved,) = checkpoint.all_checkpoints(out / "checkpoints")
    assert json.loads((saved / "state.json").read_text())["step"] == count_rows(out)


def test_a_full_disk_leaves_the_last_checkpoint_loadable(
    tile_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    calls = 0
    real = checkpoint._flush

    def full(folder: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(28, "No space left on device")
        real(folder)

    monkeypatch.setattr(checkpoint, "_flush", full)
    with pytest.raises(UserError, match=r"No space left on device.*resume"):
        run_here(tile_folder, out, overrides={"run.checkpoint_every": 1})
    saved = checkpoint.all_checkpoints(out / "checkpoints")
    assert [path.name for path in saved] == ["step_00000001", "step_00000002"]
    recipe = loop.Run(out).recipe
    method = SelfDistillation(recipe)
    assert checkpoint.load(saved[-1], method, loop.make_optimizer(method)) == 2
    assert loop.pretrain(resume=out, device="cpu", console=QUIET).metrics[-1]["step"] == 5


def test_training_goes_on_while_a_checkpoint_is_written(
    tile_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its writing is held up until two more steps are done; it holds the state it began with."""
    steps, went_on, kept = 0, threading.Event(), {}
    step, flush, save = SelfDistillation.train_step, checkpoint._flush, checkpoint.Checkpoints.save

    def counted(self: SelfDistillation, *arguments: Any) -> dict[str, torch.Tensor]:
        nonlocal steps
        result = step(self, *arguments)
        steps += 1
        if steps == 5:
            went_on.set()
        return result

    def held_up(folder: Path) -> None:
        assert went_on.wait(60), "the step waits for the disk"
        flush(folder)

    def noted(self: checkpoint.Checkpoints, step: int) -> None:
        kept[step] = {name: value.clone() for name, value in self.method.state_dict().items()}
        save(self, step)

    monkeypatch.setattr(SelfDistillation, "train_step", counted)
    monkeypatch.setattr(checkpoint, "_flush", held_up)
    monkeypatch.setattr(checkpoint.Checkpoints, "save", noted)
    run = run_here(tile_folder, tmp_path / "run", overrides={"run.checkpoint_every": 3, "run.steps": 6})
    assert steps == 6
    for path in checkpoint.all_checkpoints(run.path / "checkpoints"):
        method = SelfDistillation(run.recipe)
        number = checkpoint.load(path, method, loop.make_optimizer(method))
        state = method.state_dict()
        assert all(torch.equal(state[name], value) for name, value in kept[number].items())
    assert set(kept) == {3, 6}


def test_a_file_size_limit_is_a_full_disk_too(
    tile_folder: Path, tmp_path: Path, run_pretrain: Runner
) -> None:
    line = command(str(tile_folder), "--recipe", "tiny", "--device", "cpu", "--out", str(tmp_path / "run"),
                   overrides={"run.steps": 4, "run.checkpoint_every": 1})  # fmt: skip
    limited = f"ulimit -f 40; trap '' XFSZ; exec {' '.join(line)}"
    done = subprocess.run(
        ["bash", "-c", limited], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert "cannot be written" in last
    assert "File too large" in last
    assert "Traceback" not in done.stderr


def test_non_finite_steps_are_skipped_and_ten_in_a_row_stop_the_run(
    tile_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, bad = SelfDistillation.backward, set(range(2, 4)) | set(range(6, 20))
    states, step = [], 0

    def sometimes(self: SelfDistillation, *arguments: Any) -> dict[str, torch.Tensor]:
        nonlocal step
        states.append(next(self.student.parameters()).clone())
        found = real(self, *arguments)
        if step in bad:
            found["loss"] = found["loss"] * float("nan")
        step += 1
        return found

    monkeypatch.setattr(SelfDistillation, "backward", sometimes)
    with pytest.raises(UserError, match="10 steps in a row"):
        run_here(tile_folder, tmp_path / "run", overrides={"run.steps": 40, "run.checkpoint_every": 5})
    rows = loop.Run(tmp_path / "run").metrics
    assert [row["step"] for row in rows if row.get("skipped")] == [2, 3, *range(6, 16)]
    assert rows[2]["loss"] is None
    assert torch.equal(states[2], states[4])  # two skipped steps left the student as it was
    assert not torch.equal(states[4], states[5])
    assert (
        checkpoint.all_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step_00000005"
    )  # later ones would be no newer


def test_bad_files_are_reported_and_survived(tile_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(tile_folder, data)
    (data / "left" / "empty.jpg").write_bytes(b"")
    (data / "left" / "text.png").write_text("no image")
    good = next(data.rglob("*.jpg")).read_bytes() if (data / "left").exists() else b""
    (data / "right" / "cut.jpg").write_bytes(good[: len(good) // 2])
    overrides = {"run.steps": 12}
    run = run_here(data, tmp_path / "run", overrides=overrides)
    report = [json.loads(line) for line in (run.path / "bad_files.jsonl").read_text().splitlines()]
    reasons = {Path(entry["key"]).name: entry["reason"] for entry in report}
    assert set(reasons) == {"empty.jpg", "text.png", "cut.jpg"}
    assert reasons["empty.jpg"] == "empty file"
    assert len(run.metrics) == 12


def test_nothing_readable_is_said_before_training(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "one.jpg").write_bytes(b"no")
    with pytest.raises(UserError, match=r"holds no image that can be read \(1 files tried"):
        run_here(data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bad_use_is_one_line(tile_folder: Path, tmp_path: Path, run_pretrain: Runner) -> None:
    done = run_pretrain(str(tile_folder), "--out", str(tmp_path / "a"), "--optimizer.lrr", "1")
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0
    assert "optimizer.lr" in done.stderr


def test_a_run_is_not_overwritten(tile_folder: Path, tmp_path: Path) -> None:
    run_here(tile_folder, tmp_path / "run", overrides={"run.steps": 2})
    with pytest.raises(UserError, match="--resume"):
        run_here(tile_folder, tmp_path / "run")


def test_exported_model_is_the_teacher_and_loads_in_transformers(tile_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    from unlabeled.images.transform import normalize

    run = run_here(tile_folder, tmp_path / "run", overrides={"model.num_registers": 4})
    model, theirs = run.model(), AutoModel.from_pretrained(run.path / "model").eval()
    image = decode(next(tile_folder.rglob("*.png")).read_bytes())
    batch = normalize(torch.from_numpy(image.transpose(2, 0, 1).copy())[None])
    with torch.no_grad():
        ours = model(batch)
        found = theirs(batch).last_hidden_state
    torch.testing.assert_close(
        torch.cat((ours.cls[:, None], ours.registers, ours.patches), 1), found, atol=1e-5, rtol=0
    )


def test_one_seed_gives_one_run(tile_folder: Path, tmp_path: Path) -> None:
    runs = [
        run_here(tile_folder, tmp_path / str(n), seed=n // 2, overrides={"run.workers": n % 2})
        for n in range(4)
    ]
    first, second, other, same = (losses(run.path) for run in runs)
    assert first == second
    assert other == same
    assert first != other


def test_an_evaluation_joins_the_metrics(tile_folder: Path, tmp_path: Path) -> None:
    run = run_here(
        tile_folder, tmp_path / "run", evaluation=lambda model: {"depth": float(len(model.blocks))}
    )
    assert run.metrics[-1]["depth"] == 2


def test_accumulation_changes_memory_only(tile_folder: Path, tmp_path: Path) -> None:
    overrides = {"loss.koleo": 0.0, "run.steps": 3}  # KoLeo looks for neighbours within a part
    whole = losses(run_here(tile_folder, tmp_path / "a", overrides=overrides).path)
    parts = losses(run_here(tile_folder, tmp_path / "b", overrides=overrides | {"run.accumulation": 3}).path)
    assert [loss for _, loss in parts] == pytest.approx([loss for _, loss in whole], rel=1e-5)


def test_recipe_of_a_run_runs_again(tile_folder: Path, tmp_path: Path) -> None:
    first = run_here(tile_folder, tmp_path / "a")
    again = loop.pretrain(out=tmp_path / "b", recipe=first.path / "recipe.toml", device="cpu", console=QUIET)
    assert losses(first.path) == losses(again.path)


def test_step_seeds_differ() -> None:
    seeds = {
        loop.step_seed(seed, step, rank) for seed in range(3) for step in range(200) for rank in range(8)
    }
    assert len(seeds) == 3 * 200 * 8
    torch.manual_seed(loop.step_seed(2**63 - 1, 10**9, 7))


def test_recipe_is_checked_before_anything_is_written(tile_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be a multiple of the patch"):
        override(named_recipe("tiny"), {"crops.global_size": 100}, "x")
    with pytest.raises(UserError, match="must be a multiple of the patch"):
        run_here(tile_folder, tmp_path / "run", overrides={"crops.global_size": 33})
    with pytest.raises(UserError, match="there is nothing at"):
        run_here(tile_folder, tmp_path / "run", overrides={"data.evaluation": str(tmp_path / "labelled")})
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_one_line_and_the_one_before_is_named(
    tile_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run_here(tile_folder, out, overrides={"run.steps": 4, "run.checkpoint_every": 2})
    older, newest = checkpoint.all_checkpoints(out / "checkpoints")
    part = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    with pytest.raises(UserError) as caught:
        loop.pretrain(resume=out, steps=6, device="cpu", console=QUIET)
    said = str(caught.value)
    assert "\n" not in said and "dict_keys" not in said
    assert said.endswith(f"; remove it to go on from {older.name}")
    shutil.rmtree(newest)
    assert loop.pretrain(resume=out, steps=6, device="cpu", console=QUIET).metrics[-1]["step"] == 5


def test_denormal_numbers_are_as_they_were_after_a_run(tile_folder: Path, tmp_path: Path) -> None:
    smallest = torch.finfo(torch.float32).tiny
    for flushed in (False, True):
        torch.set_flush_denormal(flushed)
        try:
            run_here(tile_folder, tmp_path / str(flushed), steps=1)
            assert bool(torch.tensor(smallest) * 0.5 == 0) is flushed
        finally:
            torch.set_flush_denormal(False)


def test_what_changes_in_a_resumed_run_is_kept(tile_folder: Path, tmp_path: Path) -> None:
    run = run_here(tile_folder, tmp_path / "run", overrides={"run.steps": 2, "run.workers": 0})
    loop.pretrain(resume=run.path, steps=3, device="cpu", console=QUIET)
    assert run.recipe.run.steps == len(run.metrics) == 3
    with pytest.raises(UserError, match="two runs"):
        loop.pretrain(tile_folder, tmp_path / "other", resume=run.path, device="cpu")
    assert not (tmp_path / "other").exists()
