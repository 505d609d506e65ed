"""Images that move, vanish or are joined by others while a run lasts; run folders in odd places."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tests.pretrain.conftest import TINY
from unlabeled.errors import UserError
from unlabeled.images.bad_files import BadFiles
from unlabeled.images.sources import open_source
from unlabeled.pretrain import loop
from unlabeled.pretrain.data import batches
from unlabeled.pretrain.parallel import Parallel
from unlabeled.pretrain.recipe import override
from unlabeled.pretrain.recipes import named_recipe


def said(data: Path | str | None, out: Path | str, **options: object) -> str:
    """Train two steps, or go on; what is said."""
    text = io.StringIO()
    fields = TINY | {"run.steps": 2} if data else {}
    loop.pretrain(
        data, out, recipe="tiny", overrides=fields | options.pop("overrides", {}), device="cpu",
        console=Console(file=text, width=80), **options,
    )  # type: ignore[arg-type, operator]  # fmt: skip
    return text.getvalue()


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_vanish_are_one_line_and_a_report(
    workers: int, tile_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(tile_folder, tmp_path / "data")
    source, report = open_source(tmp_path / "data"), BadFiles(tmp_path / "bad_files.jsonl")
    recipe = override(named_recipe("tiny"), TINY | {"run.workers": workers}, "x")
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(
        UserError, match=r"100 images of \S+ in a row cannot be read \(last: .*No such file"
    ) as caught:
        next(batches(source, recipe, Parallel(), 0, report))
    assert "Traceback" not in str(caught.value)
    assert str(report.path) in str(caught.value)
    assert report.count > 1
    assert len(report.path.read_text().splitlines()) == report.count


def test_a_resumed_run_says_what_became_of_its_images(tile_folder: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(tile_folder, data)
    said(data, out)
    count = len(open_source(data))
    data.rename(tmp_path / "moved")
    more = {"run.steps": 3}
    with pytest.raises(UserError, match=r"nothing at .*data; .*moved, add --data\.train"):
        said(None, out, resume=out, overrides=more)
    more["data.train"] = str(tmp_path / "moved")
    assert "had" not in said(None, out, resume=out, overrides=more)
    next((tmp_path / "moved").rglob("*.png")).unlink()
    text = said(None, out, resume=out, overrides={"run.steps": 4})
    assert f"had {count} images and has {count - 1}: from here on" in text


def test_lines_are_whole_and_names_keep_their_brackets(tile_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "[bold] a run with a name that is longer than a terminal is wide [red] [red] [red]"
    lines = said(tile_folder, out).splitlines()
    assert lines[-1].endswith(f"s: {out}")


def test_a_run_has_a_folder_of_its_own(tile_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder was given"):
        said(tile_folder, " ")
    with pytest.raises(UserError, match="is the folder of the images"):
        said(tile_folder, tile_folder / "left" / "..")
    data = tmp_path / "data"
    shutil.copytree(tile_folder, data)
    count = len(open_source(data))
    said(data, data / "run")
    (data / "run" / "pictures").mkdir()
    shutil.copy(next(tile_folder.rglob("*.png")), data / "run" / "pictures")
    assert len(open_source(data)) == count
    assert (
        json.loads((data / "run" / "checkpoints" / "step_00000002" / "state.json").read_text())["num_images"]
        == count
    )


def test_a_run_is_trained_by_one_process(tile_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    said(tile_folder, out)
    script = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); "
        "print(flush=True); sys.stdin.read()"
    )
    line = [sys.executable, "-c", script, str(out / ".lock")]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(UserError, match=r"run is being trained by another process"):
            said(None, out, resume=out, overrides={"run.steps": 3})
        other.communicate(b"")
    assert "3 steps in" in said(None, out, resume=out, overrides={"run.steps": 3})
