"""What is typed for a glance must not wait for torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from unlabeled.vit import VisionTransformer, VitConfig
from unlabeled.weights.huggingface import save_huggingface

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


def test_a_model_is_described_without_torch(tmp_path: Path) -> None:
    save_huggingface(VisionTransformer(VitConfig(width=32, depth=1, num_heads=2)), tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", RUN, "info", str(tmp_path), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.split("loaded:")[1].split() == []
    assert json.loads(done.stdout)["width"] == 32


def test_the_table_of_recipes_has_columns() -> None:
    done = subprocess.run([sys.executable, "-c", RUN, "info"], capture_output=True, text=True, check=True)
    header, *rows = done.stdout[done.stdout.index("field ") :].splitlines()
    names = header.split()
    assert names[0] == "field"
    assert "tiny" in names
    values = {row.split()[0]: row.split()[1:] for row in rows}
    assert values["crops.ratio"] == ["0.75,1.33333"] * (len(names) - 1)
    assert values["model.layer_scale"][0] == "1e-05"


def test_a_model_loads_without_the_compiler(tmp_path: Path) -> None:
    """Each of these takes seconds to import and is of no use for that."""
    save_huggingface(VisionTransformer(VitConfig(width=32, depth=1, num_heads=2)), tmp_path)
    script = f"""
import sys
from unlabeled.weights.load import load_model
load_model({str(tmp_path)!r})
print(*(name for name in ("torch._dynamo", "sympy", "transformers") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("option", "said"),
    [("--lr", "did you mean --optimizer.lr?"), ("--resum", "--resume"), ("--zzz", "No such option: --zzz")],
)
def test_an_option_that_is_a_field_is_told_its_section(option: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN, "pretrain", "a", option, "1"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[0]
