"""One run of lightly-train's DINOv2 pretraining on a folder of images; prints one JSON line, last.

    RIVAL_PYTHON benchmarks/rivals/lightly_train_step.py FOLDER [--precision auto] [--steps 8] [--warmup 2]

Runs under a Python that has lightly-train 0.18.0 (see benchmarks/README.md); nothing of `unlabeled` is imported.
ViT-S/14 without registers and without pretrained weights, its own recipe otherwise: 2 x 224 + 8 x 98 crops, 65536
prototypes, drop path 0.1, shared head, centering by softmax (--centering sinkhorn_knopp: as ours).
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

# No calls home: each of them waits a minute where there is no network.
os.environ |= {"LIGHTLY_TRAIN_EVENTS_DISABLED": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}
os.environ["LIGHTLY_DID_VERSION_CHECK"] = "True"

import torch
from torch import library


def define_detection_operators() -> str:
    """torchvision of the CUDA build does not import beside a CPU build of torch, for want of these two operators.

    Pretraining calls neither. Its JPEG decoder is missing then as well, and lightly-train takes Pillow's.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        fragment = library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            fragment.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        LIBRARIES.append(fragment)  # its operators live as long as it does
        return "Pillow"
    return "torchvision"


LIBRARIES: list[Any] = []


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="dinov2/vits14-noreg-notpretrained")
    parser.add_argument("--precision", default="auto", help="auto, 32-true or bf16-mixed")
    parser.add_argument("--centering", default="softmax", choices=["softmax", "sinkhorn_knopp"])
    parser.add_argument("--flush-denormal", action="store_true", help="which it does not do by itself")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8, help="measured, after the warm-up")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    decoder = define_detection_operators()
    import lightly_train
    from lightly_train._commands import train_helpers
    from pytorch_lightning import Callback, LightningModule, Trainer

    if options.flush_denormal:
        torch.set_flush_denormal(True)
    times: list[tuple[float, float]] = []  # seconds: wall, processor
    peaks: list[float] = []
    precision = ""

    class Clock(Callback):
        """From the end of one step to the end of the next: waiting for data, all of the step, EMA."""

        def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
            nonlocal precision
            if options.device == "cuda":
                torch.cuda.synchronize()
            precision = str(trainer.precision)
            times.append((time.perf_counter(), time.process_time()))
            peaks.append(peak_memory(options.device))

    make_trainer = train_helpers.get_trainer

    def make_trainer_with_clock(**arguments: Any) -> Trainer:
        trainer = make_trainer(**arguments)
        trainer.callbacks.append(Clock())
        return trainer

    train_helpers.get_trainer = make_trainer_with_clock
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LIGHTLY_TRAIN_CACHE_DIR"] = folder
        lightly_train.pretrain(
            out=f"{folder}/run",
            data=str(options.folder),
            model=options.model,
            method="dinov2",
            method_args={"center_method": options.centering},
            batch_size=options.batch,
            epochs=1000,
            accelerator="gpu" if options.device == "cuda" else "cpu",
            devices=1,
            precision=options.precision,
            callbacks={"model_checkpoint": None, "model_export": None},
            trainer_args={
                "max_steps": options.warmup + options.steps,
                "enable_checkpointing": False,
            },
        )
    measured = list(pairwise(times))[options.warmup - 1 :]
    print(
        json.dumps(
            {
                "version": lightly_train.__version__,
                "torch": torch.__version__,
                "precision": precision,
                "centering": options.centering,
                "decoder": decoder,
                "batch": options.batch,
                "seconds": [after[0] - before[0] for before, after in measured],
                "cpu_seconds": [after[1] - before[1] for before, after in measured],
                "peak_gb": peaks[-1],
            }
        )
    )


def peak_memory(device: str) -> float:
    """GB of the training process alone: its data worker is a process of its own."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / 1e9 if sys.platform == "darwin" else size * 1024 / 1e9


if __name__ == "__main__":
    main()
