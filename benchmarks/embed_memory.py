"""Memory of `unlabeled.embed` as the table grows: many tiny images and a tiny model, resident size on the way.

python benchmarks/embed_memory.py [--images 1000000] [--cache 256] [--out benchmarks/results/embed_memory.md]

"Own" is what no file backs; the rest of what is resident are pages of libraries and of mapped files, which the system
takes back when it wants them. --cache: MB of row groups that a Parquet source keeps.
"""

import argparse
import io
import os
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

import unlabeled
from machine import device_name, peak_memory
from unlabeled.images import parquet
from unlabeled.vit import VisionTransformer, VitConfig

SIDE, WIDTH, DIFFERENT, GROUP, POINTS = 8, 384, 1000, 10_000, 10


def write_images(path: Path, count: int) -> None:
    """A Parquet file as the Hugging Face hub serves images, a part in memory at a time."""
    generator = np.random.default_rng(0)
    encoded = []
    for _ in range(DIFFERENT):
        buffer = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    with pq.ParquetWriter(path, pa.schema([("image", kind)]), use_dictionary=False) as file:
        for start in range(0, count, GROUP):
            places = range(start, min(count, start + GROUP))
            images = [{"bytes": encoded[place % DIFFERENT], "path": f"{place:08}.png"} for place in places]
            file.write_table(pa.table({"image": pa.array(images, kind)}))


def resident() -> tuple[float, float]:
    """MB of this process now: its own, and with the pages of files."""
    _, pages, of_files, *_ = map(int, Path("/proc/self/statm").read_text().split())
    megabytes = os.sysconf("SC_PAGE_SIZE") / 1e6
    return (pages - of_files) * megabytes, pages * megabytes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--cache", type=int, default=parquet.CACHE_BYTES // 2**20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    parquet.CACHE_BYTES = options.cache * 2**20
    config = VitConfig(width=WIDTH, depth=1, num_heads=6, patch_size=SIDE, image_size=SIDE)
    model = VisionTransformer(config).eval()
    rows: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_images(folder / "images.parquet", options.images)
        begun, before, finished = time.perf_counter(), resident()[0], threading.Event()

        def watch() -> None:
            wanted = 1
            while not finished.wait(0.05) or wanted <= POINTS:
                held = sum(pq.read_metadata(shard).num_rows for shard in (folder / "table").glob("*.parquet"))
                if held >= wanted * options.images // POINTS:
                    seconds = time.perf_counter() - begun
                    peak = 1000 * peak_memory(torch.device("cpu"))
                    own, whole = resident()
                    rows.append(f"| {held:,} | {own:.0f} | {whole:.0f} | {peak:.0f} | {seconds:.0f} |")
                    print(rows[-1], flush=True)
                    wanted = 1 + held * POINTS // options.images

        watcher = threading.Thread(target=watch)
        watcher.start()
        table = unlabeled.embed(folder / "images.parquet", model, folder / "table", device="cpu")
        finished.set()
        watcher.join()
        size = sum(file.stat().st_size for file in table.path.iterdir()) / 1e6
    lines = [
        f"# Memory of embedding {options.images:,} images",
        "",
        f"`python benchmarks/embed_memory.py --images {options.images} --cache {options.cache}` on "
        f"{device_name(torch.device('cpu'))}: PNGs of {SIDE} x {SIDE} pixels in a Parquet file, a ViT of one block "
        f"and one patch, {WIDTH} float32 values an image. "
        f"A Parquet source keeps up to {options.cache} MB of row groups. "
        f"The process has {before:.0f} MB of its own before it begins; the table has {size:,.0f} MB in the end.",
        "",
        "| images in the table | own, MB | resident, MB | largest so far, MB | s |",
        "|---|---|---|---|---|",
        *rows,
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
