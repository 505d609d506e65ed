"""A list of URLs to tar shards: politely, with limits, resumable, with a record of what failed and why.

    collected-000000.tar       images of the first URLs that came, in the order of the list
    record/000000.parquet      what became of each of them
    incoming/000000/           what has come of a shard that is not whole yet

A shard counts once its record is there, which is written last. The same answers make the same shards, whatever the
order in which they came.
"""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import tarfile
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unlabeled.curate.output import add_member
from unlabeled.curate.recipe import CollectRecipe
from unlabeled.errors import UserError, writing
from unlabeled.features.table import content_hash
from unlabeled.progress import Progress
from unlabeled.weights.files import replacing

if TYPE_CHECKING:
    from rich.console import Console

    from unlabeled.curate.fetch import Fetched, Fetcher

URL_NAMES = ("url", "image_url", "image_urls", "urls", "link")
LABEL_NAMES = ("label", "class", "class_name", "target")
BACKOFF = 1.0  # seconds before the first retry of a server that does not say; doubled each time
RECORD = pa.schema(
    [
        ("number", pa.int64()),  # of the URL, in the list
        ("url", pa.string()),
        ("final_url", pa.string()),  # after redirects
        ("key", pa.string()),  # name in the shard, or null
        ("content_hash", pa.string()),
        ("bytes", pa.int64()),
        ("failure", pa.string()),  # a word to count by, or null
        ("reason", pa.string()),  # a sentence
        ("tries", pa.int32()),
    ]
)


@dataclass(frozen=True)
class Collected:
    """What was fetched: a folder of tar shards, which is DATA, and why the rest was not, most first."""

    path: Path
    record: Path
    urls: int
    fetched: int
    failures: dict[str, int]


@dataclass
class _Host:
    """What is to be asked of one host."""

    waiting: deque[tuple[int, str, int]] = field(default_factory=deque)  # number, URL, tries so far
    active: int = 0
    free_at: float = 0.0  # when the next request may start


def is_url_list(data: str | Path) -> bool:
    """Whether a file is a list of URLs and no DATA."""
    path = Path(str(data)).expanduser()
    if not path.is_file():
        return False
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        try:
            schema = pq.read_schema(path)
        except (pa.ArrowException, OSError):
            return False
        has_bytes = any(pa.types.is_binary(one.type) or pa.types.is_struct(one.type) for one in schema)
        return _column(schema.names, URL_NAMES) is not None and not has_bytes
    if suffix not in (".txt", ".lst", ".csv", ".tsv"):
        return False
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        first = next((line for line in file if line.strip()), "")
    if suffix in (".csv", ".tsv"):
        names = next(csv.reader([first], delimiter="\t" if suffix == ".tsv" else ","), [])
        return _column(names, URL_NAMES) is not None
    return first.strip().lower().startswith(("http://", "https://"))


def read_urls(data: str | Path) -> Iterator[tuple[str, str | None]]:
    """Give the URLs of a list, with labels where it has a column of them.

    Raises UserError where it is no list of URLs.
    """
    path = Path(str(data)).expanduser()
    if not path.exists():
        raise UserError(f"There is no list of URLs at {path}.")
    if not is_url_list(path):
        raise UserError(
            f"{path} is no list of URLs: a .parquet, .csv or .tsv with a column url, or a .txt of URLs."
        )
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        names = pq.read_schema(path).names
        url, label = _column(names, URL_NAMES), _column(names, LABEL_NAMES)
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=[name for name in (url, label) if name]):
                urls = batch.column(0).to_pylist()
                labels = batch.column(1).to_pylist() if label else [None] * len(urls)
                for one, text in zip(urls, labels, strict=True):
                    yield str(one or "").strip(), None if text is None else str(text)
        return
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        if suffix in (".txt", ".lst"):
            yield from ((line.strip(), None) for line in file if line.strip())
            return
        reader = csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ",")
        names = list(reader.fieldnames or [])
        url, label = _column(names, URL_NAMES), _column(names, LABEL_NAMES)
        for row in reader:
            yield (row[str(url)] or "").strip(), (row[label] or None) if label else None


def _column(names: list[str], wanted: tuple[str, ...]) -> str | None:
    by_name = {name.strip().lower(): name for name in reversed(names)}
    return next((by_name[name] for name in wanted if name in by_name), None)


def collect(
    urls: str | Path, out: str | Path, recipe: CollectRecipe | None = None, *, console: Console | None = None
) -> Collected:
    """Fetch a list of URLs into tar shards at `out`; a run that was stopped goes on, what failed stays failed.

    urls: .parquet, .csv or .tsv with a column url (and perhaps label), or .txt. recipe: limits and politeness.
    Raises UserError: no such list, a folder that is something else or of another list, no image at all, a full disk.
    """
    from unlabeled.curate.fetch import Fetcher

    recipe, folder = recipe or CollectRecipe(), Path(out).expanduser()
    listed = list(read_urls(urls))
    if not listed:
        raise UserError(f"{urls} lists no URL.")
    _claim(folder, listed, recipe)
    size = recipe.urls_per_shard
    starts = range(0, len(listed), size)
    records = [folder / "record" / f"{number:06}.parquet" for number in range(len(starts))]
    done = sum(
        min(size, len(listed) - start) for start, one in zip(starts, records, strict=True) if one.exists()
    )
    bar = (
        Progress(console, "collecting", "URL", done, len(listed)) if console and done < len(listed) else None
    )
    fetcher = Fetcher(recipe)
    if bar:
        bar.__enter__()
    try:
        for number, start in enumerate(starts):
            if records[number].exists():
                continue
            batch = {start + place: one[0] for place, one in enumerate(listed[start : start + size])}
            labels = {start + place: one[1] for place, one in enumerate(listed[start : start + size])}
            incoming = folder / "incoming" / f"{number:06}"
            with writing(incoming):
                incoming.mkdir(parents=True, exist_ok=True)
            for _ in _fetched(fetcher, batch, incoming, recipe):
                done += 1
                if bar:
                    bar.update(done, "")
            _write_shard(folder / f"collected-{number:06}.tar", records[number], incoming, batch, labels)
            shutil.rmtree(incoming)
    finally:
        fetcher.close()
        if bar:
            bar.__exit__()
    shutil.rmtree(folder / "incoming", ignore_errors=True)
    record = pa.concat_tables([pq.read_table(one, columns=["failure", "reason"]) for one in records])
    counted = pc.value_counts(record.column("failure").drop_null()).to_pylist()
    failures = {one["values"]: one["counts"] for one in sorted(counted, key=lambda one: -one["counts"])}
    fetched = record.column("failure").null_count
    if not fetched:
        first = record.column("reason")[0].as_py()
        raise UserError(
            f"None of the {len(listed):,} URLs of {urls} gave an image (the first: {first}); to try again, choose "
            "another --out."
        )
    return Collected(folder, folder / "record", len(listed), fetched, failures)


def _claim(folder: Path, listed: list[tuple[str, str | None]], recipe: CollectRecipe) -> None:
    """Refuse a folder that is something else, or of another list or shard size."""
    file = folder / "collection.json"
    digest = hashlib.sha256("\n".join(f"{url}\t{label}" for url, label in listed).encode("utf-8", "replace"))
    state = {"urls": len(listed), "list": digest.hexdigest()[:32], "urls_per_shard": recipe.urls_per_shard}
    if file.is_file():
        if json.loads(file.read_text()) != state:
            raise UserError(
                f"{folder} was begun with another list of URLs or urls_per_shard; choose another --out."
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is no collection of URLs; choose another --out.")
    with writing(folder), replacing(file) as part:
        part.write_text(json.dumps(state))


def _fetched(fetcher: Fetcher, urls: dict[int, str], incoming: Path, recipe: CollectRecipe) -> Iterator[int]:
    """Fetch URLs, but for those that have come, into a folder; gives the number of each when it is settled.

    Each host has its own queue, so that a slow one does not hold up the others.
    """
    hosts: dict[str, _Host] = {}
    for number, url in urls.items():
        if (incoming / f"{number:09}.json").exists():
            yield number
            continue
        try:
            name = urlsplit(url).netloc.lower()
        except ValueError:  # the fetch says what is wrong with it
            name = ""
        hosts.setdefault(name, _Host()).waiting.append((number, url, 1))
    running: dict[Future[Fetched], tuple[_Host, int, str, int]] = {}
    with ThreadPoolExecutor(recipe.connections) as pool:
        while hosts or running:
            now = time.monotonic()
            for name, host in list(hosts.items()):
                while (
                    host.waiting
                    and host.active < recipe.per_host
                    and host.free_at <= now
                    and len(running) < recipe.connections
                ):
                    number, url, tries = host.waiting.popleft()
                    host.active += 1
                    host.free_at = now + recipe.delay
                    running[pool.submit(fetcher.fetch, url)] = (host, number, url, tries)
                if not host.waiting and not host.active:
                    del hosts[name]
            next_at = min(
                (host.free_at for host in hosts.values() if host.waiting and host.active < recipe.per_host),
                default=now + 1.0,
            )
            if not running:
                time.sleep(max(0.0, min(1.0, next_at - now)))
                continue
            full = len(running) >= recipe.connections
            pause = 1.0 if full else max(0.005, min(1.0, next_at - now))
            finished, _ = wait(running, timeout=pause, return_when=FIRST_COMPLETED)
            for future in finished:
                host, number, url, tries = running.pop(future)
                host.active -= 1
                if _settled(future, host, number, url, tries, incoming, recipe):
                    yield number


def _settled(
    future: Future[Fetched],
    host: _Host,
    number: int,
    url: str,
    tries: int,
    incoming: Path,
    recipe: CollectRecipe,
) -> bool:
    """Write what became of a URL; False where it is to be tried again."""
    from unlabeled.curate.fetch import FetchError

    row: dict[str, Any] = {"number": number, "url": url, "tries": tries}
    stem = f"{number:09}"
    try:
        found = future.result()
    except FetchError as error:
        if error.again and tries <= recipe.retries and error.wait <= recipe.max_wait:
            pause = error.wait or BACKOFF * 2 ** (tries - 1)
            host.free_at = max(host.free_at, time.monotonic() + pause)
            host.waiting.append((number, url, tries + 1))
            return False
        row |= {"failure": error.kind, "reason": str(error)}
    else:
        key = stem + found.suffix
        with writing(incoming), replacing(incoming / key) as part:
            part.write_bytes(found.data)
        row |= {
            "final_url": found.url,
            "key": key,
            "content_hash": content_hash(found.data),
            "bytes": len(found.data),
        }
    with writing(incoming), replacing(incoming / f"{stem}.json") as part:
        part.write_text(json.dumps(row))
    return True


def _write_shard(
    shard: Path, record: Path, incoming: Path, urls: dict[int, str], labels: dict[int, str | None]
) -> None:
    """Pack what has come of a shard's URLs, and write its record last."""
    rows = [json.loads((incoming / f"{number:09}.json").read_text()) for number in sorted(urls)]
    with writing(shard):
        if any("key" in row for row in rows):
            with replacing(shard) as part, tarfile.open(part, "w") as archive:
                for row in rows:
                    if "key" not in row:
                        continue
                    notes = {"url": row["url"]}
                    if labels[row["number"]] is not None:
                        notes["label"] = str(labels[row["number"]])
                    add_member(archive, row["key"], (incoming / row["key"]).read_bytes())
                    add_member(archive, f"{row['number']:09}.json", json.dumps(notes).encode())
        table = pa.table({name: [row.get(name) for row in rows] for name in RECORD.names}, schema=RECORD)
        with replacing(record) as part:
            pq.write_table(table, part)
