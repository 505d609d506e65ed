"""Images to features: unlabeled beside transformers as a user would write it, ViT-S/14 at 224, on the same files.

    python benchmarks/embed.py photos.tar [--model MODEL] [--knn MODEL TRAIN TEST] [--out benchmarks/results/embed.md]

Random weights by default: rates and rounding hardly depend on them. --knn measures what 8 bits change for a trained
model on labelled images. All rates are of this run, in turns, the best round of each; each turn is a process.
"""

import argparse
import multiprocessing
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoImageProcessor, BitImageProcessor, Dinov2Config, Dinov2Model

import unlabeled
from machine import device_name, gemm_rate, report
from unlabeled.devices import has_bf16
from unlabeled.evaluate.knn import knn_accuracy
from unlabeled.features.engines import exact_engine
from unlabeled.images.sources import open_source
from unlabeled.weights.graph import (
    Runner,
    onnx_runner,
    openvino_runner,
    save_onnx,
    save_openvino,
    trace,
)
from unlabeled.weights.quantize import quantize, read_images

BATCH, K = 16, 10
FLOPS = 2 * 257 * 12 * 12 * 384**2 + 4 * 12 * 257**2 * 384  # of ViT-S/14 at 224: products, attention


def random_model(folder: Path) -> None:
    """A ViT-S/14 as transformers saves it, with the preprocessing of facebook/dinov2-small."""
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, num_hidden_layers=12, image_size=518)
    Dinov2Model(config).save_pretrained(folder)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    BitImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, resample=3,
                      image_mean=mean, image_std=std).save_pretrained(folder)  # fmt: skip


def rival(model: Path, files: list[Path]) -> tuple[NDArray[np.float32], float]:
    """CLS features (N, D) and images/s, loading the model left out."""
    processor = AutoImageProcessor.from_pretrained(model)
    network = Dinov2Model.from_pretrained(model).eval()
    features = []
    begun = time.perf_counter()
    for start in range(0, len(files), BATCH):
        images = [Image.open(file).convert("RGB") for file in files[start : start + BATCH]]
        inputs = processor(images=images, return_tensors="pt")
        with torch.no_grad():
            features.append(network(**inputs).last_hidden_state[:, 0].numpy())
    return np.concatenate(features), len(files) / (time.perf_counter() - begun)


def ours(model: Path, photos: Path, out: Path, fast: bool) -> tuple[NDArray[np.float32], float]:
    """The same by `unlabeled.embed`, writing the table included."""
    table = unlabeled.embed(photos, model, out, fast=fast, device="cpu")
    return np.asarray(table.vectors), table.images_per_second


def in_a_process(
    function: Callable[..., tuple[NDArray[np.float32], float]], *arguments: object
) -> tuple[NDArray[np.float32], float]:
    """What a function returns; what one turn tells its process about threads and memory does not reach the next."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of rows, (N,)."""
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def neighbours_kept(features: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Share of each image's 10 nearest others that are the same by both."""
    found = []
    for vectors in (features, reference):
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        similarity = unit @ unit.T
        np.fill_diagonal(similarity, -2)
        found.append(np.argpartition(-similarity, K, axis=1)[:, :K])
    return float((found[0][:, :, None] == found[1][:, None, :]).any(2).mean())


def compared(features: NDArray[np.float32], reference: NDArray[np.float32]) -> str:
    """Table cells: cosine mean and worst, neighbours kept."""
    cosine = cosines(features, reference)
    kept = neighbours_kept(features, reference)
    return f"{cosine.mean():.5f} | {cosine.min():.5f} | {100 * kept:.1f}%"


def networks(model: Path, photos: Path, folder: Path, rounds: int) -> list[str]:
    """Bare networks on the same batches: what the fast and the exact path were chosen from."""
    backbone = unlabeled.load_model(model)
    images = list(read_images(str(photos), backbone.config))
    batches = [
        np.concatenate(images[start : start + BATCH]) for start in range(0, min(64, len(images)), BATCH)
    ]
    runners: dict[str, Callable[[NDArray[np.float32]], NDArray[np.float32]]] = {}

    def add(name: str, run: Runner) -> None:
        runners[name] = lambda batch: run(batch)["cls"]

    exact = exact_engine(backbone, -1, torch.device("cpu"))
    with torch.inference_mode():
        runners["torch, float32 (MKL)"] = lambda batch: backbone(torch.from_numpy(batch)).cls.numpy()
        runners["torch, float32, packed (oneDNN): the exact path"] = lambda batch: exact(
            torch.from_numpy(batch)
        ).cls.numpy()
        onnx, openvino = folder / "onnx", folder / "openvino"
        onnx.mkdir(), openvino.mkdir()
        save_onnx(trace(backbone), backbone.config, onnx / "model.onnx")
        save_openvino(onnx / "model.onnx", openvino / "model.xml", backbone.config)
        add("ONNX Runtime, float32", onnx_runner(onnx / "model.onnx"))
        add("OpenVINO, float32", openvino_runner(openvino / "model.xml"))
        for to, place, run in (
            ("onnx", onnx / "model.onnx", onnx_runner),
            ("openvino", openvino / "model.xml", openvino_runner),
        ):
            eight = folder / f"{to}8"
            place.parent.rename(eight)  # the float32 runner has the graph in memory, or its file mapped
            quantize(to, eight / place.name, images[:100], run)
            name = "ONNX Runtime, int8" if to == "onnx" else "OpenVINO, int8"
            add(name, run(eight / place.name))
        if has_bf16(torch.device("cpu")):
            faster = openvino_runner(eight / place.name, precision="bf16")
            add("OpenVINO, int8, the rest bfloat16: the fast path here", faster)
        rates: dict[str, float] = {}
        found: dict[str, NDArray[np.float32]] = {}
        for _ in range(rounds):
            for name, run_batch in runners.items():
                run_batch(batches[0])
                begun = time.perf_counter()
                found[name] = np.concatenate([run_batch(batch) for batch in batches])
                seconds = time.perf_counter() - begun
                rates[name] = max(rates.get(name, 0), sum(map(len, batches)) / seconds)
    first = next(iter(runners))
    peak = gemm_rate(torch.device("cpu"), torch.float32, BATCH * 257, 384, 1536)
    lines = [
        "## Bare networks",
        "",
        f"Batches of {BATCH} that are in memory already; int8 by NNCF, calibrated on 75 of 100, compared on 64 of "
        f"them. torch's own product of this network's shape reaches {peak / 1e9:.0f} GFLOP/s here, at which the "
        f"network would do {peak / FLOPS:.1f} images/s.",
        "",
        "| | images/s | times torch | cosine to torch, mean | worst |",
        "|---|---|---|---|---|",
    ]
    for name, rate in rates.items():
        cosine = cosines(found[name], found[first])
        lines.append(
            f"| {name} | {rate:.1f} | {rate / rates[first]:.2f} | {cosine.mean():.5f} | {cosine.min():.5f} |"
        )
    return lines


def knn(model: str, train: str, test: str, count: int, folder: Path) -> list[str]:
    """Accuracy with features of either precision, all rows of both tables by the same images."""
    lines = [
        "## A trained model",
        "",
        f"k-NN (k = 20) on {count} and {count // 2} labelled images; calibrated on the training images.",
        "",
        "| | accuracy | images/s | cosine, mean | worst | 10 nearest kept |",
        "|---|---|---|---|---|---|",
    ]
    reference: NDArray[np.float32] | None = None
    sources = [_subset(open_source(data), number, folder / name)
               for data, number, name in ((train, count, "train"), (test, count // 2, "test"))]  # fmt: skip
    for fast in (False, True):
        extractor = unlabeled.Extractor(model, fast=fast, calibrate=str(folder / "train"), device="cpu")
        begun = time.perf_counter()
        features = [extractor([str(file) for file in files]) for files, _ in sources]
        rate = (count + count // 2) / (time.perf_counter() - begun)
        accuracy = knn_accuracy(features[0], sources[0][1], features[1], sources[1][1])
        reference = features[1] if reference is None else reference
        cells = compared(features[1], reference)
        lines.append(f"| {'--fast' if fast else 'float32'} | {100 * accuracy:.2f}% | {rate:.0f} | {cells} |")
    return lines


def _subset(source: object, count: int, folder: Path) -> tuple[list[Path], NDArray[np.int64]]:
    """The first images of a source as files, and their labels."""
    folder.mkdir()
    files, labels = [], []
    for index in range(count):
        sample = source.read(index)  # type: ignore[attr-defined]
        files.append(folder / f"{index:06}.png")
        files[-1].write_bytes(sample.data)
        labels.append(sample.label)
    return files, np.array(labels, np.int64)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", type=Path, help="a tar of JPEG files")
    parser.add_argument("--images", type=int, default=384, help="those of the tar, again where it has fewer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--model", type=Path, help="a folder in Hugging Face format; random ViT-S/14 by default"
    )
    parser.add_argument("--knn", nargs=3, metavar=("MODEL", "TRAIN", "TEST"))
    parser.add_argument("--knn-images", type=int, default=4000)
    parser.add_argument("--float32", action="store_true", help="leave out --fast and the bare networks")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        photos, model = folder / "photos", options.model or folder / "model"
        photos.mkdir()
        with tarfile.open(options.photos) as tar:
            pictures = [tar.extractfile(one).read() for one in tar if one.name.endswith(".jpg")]  # type: ignore[union-attr]
        for number in range(options.images):
            (photos / f"{number:06}.jpg").write_bytes(pictures[number % len(pictures)])
        files, different = sorted(photos.glob("*.jpg")), min(options.images, len(pictures))
        if not options.model:
            random_model(model)
        once = ""
        if not options.float32:
            begun = time.perf_counter()
            ours(model, photos, folder / "calibration", True)
            once = (
                "`--fast` was calibrated on these photographs once, beforehand "
                f"({time.perf_counter() - begun:.0f} s with a first pass)."
            )
        rates: dict[str, float] = {}
        found: dict[str, NDArray[np.float32]] = {}
        for turn in range(options.rounds):
            for name, run, *arguments in (
                ("transformers", rival, model, files),
                ("unlabeled", ours, model, photos, folder / f"exact{turn}", False),
                ("unlabeled --fast", ours, model, photos, folder / f"fast{turn}", True),
            ):
                if name == "unlabeled --fast" and options.float32:
                    continue
                found[name], rate = in_a_process(run, *arguments)
                rates[name] = max(rates.get(name, 0), rate)
                print(f"{name}: {rate:.2f} images/s", flush=True)
        lines = [
            "# Images to features",
            "",
            f"`python benchmarks/embed.py` on {device_name(torch.device('cpu'))}; torch {torch.__version__}. "
            f"{len(files)} JPEG files of {different} photographs of about 500 x 375, to CLS features at 224 pixels; "
            "decoding, resizing and, with us, compiling (`--fast`) and writing the table are included; loading the "
            "model is not. "
            f"The best of {options.rounds} rounds, in turns. {once}",
            "",
            "| | images/s | times transformers | cosine to transformers, mean | worst | 10 nearest kept |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {name} | {rate:.2f} | {rate / rates['transformers']:.2f} | "
            f"{compared(found[name][:different], found['transformers'][:different])} |"
            for name, rate in rates.items()
        ]
        report(lines, options.out)
        if options.knn:
            report(["", *knn(*options.knn, options.knn_images, folder)], options.out)
        if not options.float32:
            report(["", *networks(model, photos, folder, options.rounds)], options.out)


if __name__ == "__main__":
    main()
