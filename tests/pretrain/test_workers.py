"""Workers that begin with an empty memory, as on macOS, and from Python 3.14 on elsewhere."""

import multiprocessing
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import unlabeled
from tests.pretrain.conftest import TINY, environment
from unlabeled.curate.copy_detector import train_copy_detector
from unlabeled.dense.scene_data import write_scenes
from unlabeled.errors import UserError
from unlabeled.images.bad_files import BadFiles
from unlabeled.images.sources import open_source
from unlabeled.pretrain.data import batches
from unlabeled.pretrain.parallel import Parallel
from unlabeled.pretrain.recipe import override
from unlabeled.pretrain.recipes import named_recipe


@pytest.fixture
def spawned() -> Iterator[None]:
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.usefixtures("spawned")
def test_spawned_workers_make_the_same_batches(tile_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(tile_folder, data)
    (data / "bad.png").write_text("no image")
    made = {}
    for workers in (0, 1):
        report = BadFiles(tmp_path / f"{workers}.jsonl")
        recipe = override(named_recipe("tiny"), TINY | {"run.steps": 4, "run.workers": workers}, "test")
        made[workers] = list(batches(open_source(data), recipe, Parallel(), 0, report))
    for (step, ours), (other, theirs) in zip(made[1], made[0], strict=True):
        assert step == other
        assert torch.equal(ours.globals_VB3HW, theirs.globals_VB3HW)
        assert torch.equal(ours.locals_VB3HW, theirs.locals_VB3HW)
        assert ours.masks is not None
        assert theirs.masks is not None
        assert torch.equal(ours.masks.hidden_VBN, theirs.masks.hidden_VBN)
    assert (tmp_path / "1.jsonl").read_text() == (tmp_path / "0.jsonl").read_text() != ""


SCRIPT = """
import multiprocessing, sys, unlabeled
multiprocessing.set_start_method("spawn", force=True)
unlabeled.pretrain(sys.argv[1], out=sys.argv[2], recipe="tiny", device="cpu", overrides={fields})
"""


def test_a_script_that_its_workers_import_is_told_what_is_amiss(tile_folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(fields=TINY | {"run.steps": 2, "run.workers": 1}))
    ended = subprocess.run(
        [sys.executable, script, tile_folder, tmp_path / "run"],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert ended.returncode == 1
    assert 'put it under `if __name__ == "__main__":`' in ended.stderr
    assert "another process" not in ended.stderr


def test_it_is_so_for_all_that_start_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    for start in (
        lambda: unlabeled.pretrain("x", out=tmp_path / "out"),
        lambda: train_copy_detector("x", tmp_path / "out"),
        lambda: write_scenes(tmp_path / "out", "x", 1),
    ):
        with pytest.raises(UserError, match="import your script"):
            start()
    assert not (tmp_path / "out").exists()
