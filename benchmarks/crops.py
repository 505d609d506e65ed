"""Images/s per core from a tar of JPEG files to the crops of the real recipe, decoding included.

    python benchmarks/crops.py [TAR] [--images 100] [--repeats 5] [--out benchmarks/results/crops.md]

Rows: ours; the pipeline of the DINOv2 release (Pillow for decoding, resizing and colour, torch for the blur:
the calls torchvision makes, and its float tensor at the end); the decoders alone, which are the limit.
Single-threaded, in process CPU time, the rows interleaved so that a noisy machine disturbs all of them alike.
"""

import argparse
import io
import random
import statistics
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from unlabeled.images.decode import decode
from unlabeled.pretrain.crops import CropRecipe, draw_parameters, make_crops

RECIPE = CropRecipe()
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def read_tar(path: Path, count: int) -> list[bytes]:
    """The first `count` JPEG files."""
    files = []
    with tarfile.open(path) as tar:
        for member in tar:
            opened = tar.extractfile(member)
            if opened is not None and member.name.lower().endswith((".jpg", ".jpeg")):
                files.append(opened.read())
            if len(files) == count:
                break
    return files


def rival_open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def rival_resized_crop(image: Image.Image, size: int, scale: tuple[float, float]) -> Image.Image:
    width, height = image.size
    low, high = np.log(RECIPE.ratio[0]), np.log(RECIPE.ratio[1])
    for _ in range(10):
        area = width * height * torch.empty(1).uniform_(*scale).item()
        aspect = float(torch.exp(torch.empty(1).uniform_(low, high)))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(0, height - h + 1, (1,)))
            left = int(torch.randint(0, width - w + 1, (1,)))
            break
    else:
        w = min(width, round(height * RECIPE.ratio[1]))
        h = min(height, round(width / RECIPE.ratio[0]))
        top, left = (height - h) // 2, (width - w) // 2
    crop = image.crop((left, top, left + w, top + h)).resize((size, size), Image.Resampling.BICUBIC)
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < RECIPE.flip else crop


def rival_hue(image: Image.Image, shift: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    turned = np.array(hue, dtype=np.uint8) + np.int32(shift * 255).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(turned, "L"), saturation, value)).convert("RGB")


def rival_colour(image: Image.Image) -> Image.Image:
    if random.random() < RECIPE.jitter:
        order = torch.randperm(4)
        factors = [float(torch.empty(1).uniform_(1 - x, 1 + x)) for x in (RECIPE.brightness, RECIPE.contrast)]
        factors.append(float(torch.empty(1).uniform_(1 - RECIPE.saturation, 1 + RECIPE.saturation)))
        hue = float(torch.empty(1).uniform_(-RECIPE.hue, RECIPE.hue))
        for number in order:
            if number == 3:
                image = rival_hue(image, hue)
            else:
                enhancer = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[number]
                image = enhancer(image).enhance(factors[number])
    if random.random() < RECIPE.grey:
        grey = np.array(image.convert("L"), dtype=np.uint8)
        image = Image.fromarray(np.dstack([grey, grey, grey]), "RGB")
    return image


def rival_blur(image: Image.Image, probability: float) -> Image.Image:
    if random.random() >= probability:
        return image
    sigma = torch.empty(1).uniform_(*RECIPE.blur_sigma).item()
    taps = torch.exp(-0.5 * (torch.linspace(-4, 4, 9) / sigma) ** 2)
    taps = taps / taps.sum()
    kernel = torch.mm(taps[:, None], taps[None, :]).expand(3, 1, 9, 9)
    planes = torch.from_numpy(np.array(image, copy=True)).permute(2, 0, 1)[None].to(torch.float32)
    padded = torch.nn.functional.pad(planes, [4, 4, 4, 4], mode="reflect")
    blurred = torch.nn.functional.conv2d(padded, kernel, groups=3).round_().to(torch.uint8)[0]
    return Image.fromarray(blurred.permute(1, 2, 0).numpy())


def rival_tensor(image: Image.Image) -> torch.Tensor:
    planes = torch.from_numpy(np.array(image, copy=True)).permute(2, 0, 1).contiguous()
    return planes.to(torch.float32).div(255).sub_(MEAN[:, None, None]).div_(STD[:, None, None])


def rival_crops(image: Image.Image) -> list[Image.Image]:
    """Two global and eight local crops, still as 8-bit images."""
    crops = []
    for view in range(RECIPE.num_globals):
        crop = rival_colour(rival_resized_crop(image, RECIPE.global_size, RECIPE.global_scale))
        crop = rival_blur(crop, RECIPE.blur[view])
        if view == 1 and random.random() < RECIPE.solarise:
            crop = ImageOps.solarize(crop, RECIPE.solarise_threshold)
        crops.append(crop)
    for _ in range(RECIPE.num_locals):
        crop = rival_colour(rival_resized_crop(image, RECIPE.local_size, RECIPE.local_scale))
        crops.append(rival_blur(crop, RECIPE.blur[2]))
    return crops


def device() -> str:
    """What the figures were measured on, from /proc/cpuinfo where there is one."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    found = {key.strip(): value.strip() for key, value in fields.items()}
    name = found.get("model name", "unknown CPU")
    zen5 = found.get("vendor_id") == "AuthenticAMD" and found.get("cpu family") == "26"
    return f"{name}{' (Zen 5)' if zen5 else ''}, 1 core"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tar", nargs="?", type=Path, default=Path("../shared/data/photos-000000.tar"))
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    files = read_tar(arguments.tar, arguments.images)
    decoded = [decode(data) for data in files]
    rng = np.random.default_rng(0)
    rows: dict[str, Callable[[], object]] = {
        "ours: decode + crops": lambda: [make_crops(decode(data), RECIPE, rng) for data in files],
        "ours: crops of decoded images": lambda: [make_crops(image, RECIPE, rng) for image in decoded],
        "ours: drawing the parameters": lambda: [draw_parameters(*x.shape[:2], RECIPE, rng) for x in decoded],
        "release: decode + crops, Pillow and torch": lambda: [
            [rival_tensor(crop) for crop in rival_crops(rival_open(data))] for data in files
        ],
        "limit: our decoder alone": lambda: [decode(data) for data in files],
        "limit: OpenCV's decoder alone": lambda: [
            cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB) for data in files
        ],
        "limit: Pillow's decoder alone": lambda: [rival_open(data) for data in files],
    }
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for work in rows.values():
        work()
    for _ in range(arguments.repeats):
        for name, work in rows.items():
            start = time.process_time()
            work()
            seconds[name].append((time.process_time() - start) / len(files))
    base = statistics.median(seconds["release: decode + crops, Pillow and torch"])
    kilobytes = np.median([len(data) for data in files]) / 1e3
    pixels = np.median([x.shape[0] * x.shape[1] for x in decoded]) / 1e3
    lines = [
        f"{device()}; {len(files)} photographs, median {kilobytes:.0f} kB and {pixels:.0f} thousand pixels; "
        f"{RECIPE.num_globals} x {RECIPE.global_size} + {RECIPE.num_locals} x {RECIPE.local_size}; "
        f"median of {arguments.repeats} repeats, CPU time.",
        "",
        "| | ms an image | images/s | slowest..fastest | times the release |",
        "|---|---|---|---|---|",
    ]
    for name, times in seconds.items():
        middle = statistics.median(times)
        lines.append(
            f"| {name} | {1e3 * middle:.2f} | {1 / middle:.0f} | {1 / max(times):.0f}..{1 / min(times):.0f} "
            f"| {base / middle:.1f} |"
        )
    table = "\n".join(lines)
    print(table)
    if arguments.out:
        notes = arguments.out.read_text().partition("\n## ") if arguments.out.exists() else ("", "", "")
        arguments.out.write_text(f"# Crops\n\n{table}\n" + notes[1] + notes[2])


if __name__ == "__main__":
    main()
