"""Weights from the network, each once: Meta's files by their address, all else through the Hugging Face hub."""

import hashlib
import http.client
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock
from tqdm import tqdm

from unlabeled.errors import UserError, writing
from unlabeled.json_file import read_json
from unlabeled.weights.layout import read_config

META_SERVER = "https://dl.fbaipublicfiles.com"
TIMEOUT = 30  # seconds without a byte
CHUNK = 2**20  # bytes
MD5_TAG = re.compile(r'"([0-9a-f]{32})"')  # the ETag of a file that a server of the S3 kind got in one piece


class BrokenTransferError(Exception):
    """A transfer that came to no end; the text says why."""

    def __init__(self, reason: object, kept: int) -> None:
        super().__init__(str(reason))
        self.kept = kept  # bytes on disk


class Part(NamedTuple):
    """A file that has arrived whole under a temporary name."""

    path: Path
    md5: str  # as the server gives it, "" if it does not


def fetch_meta(place: str) -> Path:
    """Return the path in torch's hub cache of a file that Meta publishes, downloading it if it is not there.

    place: below META_SERVER, as dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / place.rpartition("/")[2]
    return fetch_file(f"{META_SERVER}/{place}", path)


def fetch_file(url: str, path: Path) -> Path:
    """Return `path`; if there is no such file, download it there first.

    A broken transfer goes on where it stopped, now or at the next call, where the server allows it. The file
    is held against the server's length and, where its ETag is one, MD5, and then renamed to `path`. If there
    is a file PATH.sha256, as sha256sum writes it, the content must have that sum, also where it was there.
    HF_HUB_OFFLINE forbids downloads.
    Raises UserError where there is no network, no such file, no room, or another content.
    """
    if not path.exists():
        from huggingface_hub import constants

        by_hand = f"fetch it where there is a network and put it at {path}"
        if constants.HF_HUB_OFFLINE:
            raise UserError(f"{path} is not there, and HF_HUB_OFFLINE is set; {by_hand}: {url}.")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # The processes of one training run ask for the same file at once.
            with FileLock(path.with_name(f".{path.name}.lock")):
                if not path.exists():
                    _download(url, path, by_hand)
    _hold_against_pinned(path, path)
    return path


def _download(url: str, path: Path, by_hand: str) -> None:
    kept = 0
    while True:
        try:
            part = _transfer(url, path)
            break
        except BrokenTransferError as broken:
            if broken.kept <= kept:  # tried again for as long as something comes
                some = (
                    f"after {broken.kept:,} bytes, which the next try goes on from: " if broken.kept else ""
                )
                raise UserError(f"Cannot download {url} ({some}{broken}); {by_hand}.") from broken
            kept = broken.kept
    if part.md5 and (have := _digest(part.path, "md5")) != part.md5:
        part.path.unlink()
        raise UserError(f"{url} arrived damaged (MD5 {have}, the server says {part.md5}); try again.")
    try:
        _hold_against_pinned(part.path, path)
    except UserError:
        part.path.unlink()
        raise
    part.path.replace(path)
    for stale in path.parent.glob(f".{path.name}.*.part"):  # of what the server had before
        stale.unlink(missing_ok=True)


def _transfer(url: str, path: Path) -> Part:
    """Bring a file whole to a temporary name beside `path`, going on from what an earlier call left there."""
    first = _open(url, 0)
    with first:
        tag = first.headers.get("ETag", "")
        total = int(first.headers.get("Content-Length", "0"))
        part = path.with_name(f".{path.name}.{hashlib.sha256(tag.encode()).hexdigest()[:12]}.part")
        md5 = MD5_TAG.fullmatch(tag)
        whole = Part(part, md5[1] if md5 else "")
        # Without a tag nothing tells that the rest would be the rest of the same file.
        have = part.stat().st_size if tag and part.exists() else 0
        if not have or have > total:
            _receive(first, part, "wb", total)
            return whole
    if have < total:
        with _open(url, have, {"Range": f"bytes={have}-", "If-Range": tag}) as rest:
            if rest.headers.get("ETag", "") != tag:
                raise BrokenTransferError("the file changed on the server", 0)
            goes_on = rest.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            _receive(rest, part, "ab" if goes_on else "wb", total)
    return whole


def _open(url: str, kept: int, headers: dict[str, str] | None = None) -> http.client.HTTPResponse:
    request = urllib.request.Request(url, headers={"User-Agent": "unlabeled"} | (headers or {}))
    try:
        response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        raise BrokenTransferError(f"the server says {error.code} {error.reason}", kept) from error
    except urllib.error.URLError as error:
        raise BrokenTransferError(error.reason, kept) from error
    except (OSError, http.client.HTTPException) as error:
        raise BrokenTransferError(error or type(error).__name__, kept) from error
    return response


def _receive(response: http.client.HTTPResponse, part: Path, mode: str, total: int) -> None:
    """Write what comes to `part`; raises BrokenTransferError if it is less than `total` bytes in all."""
    with (
        part.open(mode) as file,
        tqdm(total=total or None, initial=file.tell(), unit="B", unit_scale=True, disable=None) as bar,
    ):
        while True:
            try:
                chunk = response.read(CHUNK)
            except (OSError, http.client.HTTPException) as error:
                raise BrokenTransferError(error or type(error).__name__, file.tell()) from error
            if not chunk:
                break
            file.write(chunk)
            bar.update(len(chunk))
        if file.tell() < total:
            raise BrokenTransferError(
                f"the connection was closed at {file.tell():,} of {total:,} bytes", file.tell()
            )


def _hold_against_pinned(content: Path, path: Path) -> None:
    """Raise UserError if PATH.sha256 exists and gives another sum than that of the content."""
    pinned = path.with_name(f"{path.name}.sha256")
    if not pinned.exists():
        return
    wanted = pinned.read_text(encoding="utf-8", errors="replace").split()[:1]
    if not wanted or not re.fullmatch(r"[0-9a-fA-F]{64}", wanted[0]):
        raise UserError(f"{pinned} holds no SHA-256; expected 64 hexadecimal digits.")
    if (have := _digest(content, "sha256")) != wanted[0].lower():
        raise UserError(f"{path.name} has the SHA-256 {have}, and {pinned} wants {wanted[0]}; fetch it anew.")


def _digest(path: Path, name: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(name, usedforsecurity=False)).hexdigest()


def fetch_hub(name: str, hint: str) -> Path:
    """Return the folder of a model of the Hugging Face hub in its cache, downloading it if it is not there.

    hint: what to say to a name that the hub does not have, or that cannot be asked for.
    Honours HF_ENDPOINT, HF_HOME, HF_HUB_CACHE, HF_TOKEN and HF_HUB_OFFLINE.
    """
    # The hub client is slow to import, and needed for names only.
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.errors import RepositoryNotFoundError as NotFoundError

    def fetch(*patterns: str) -> Path:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))

    page = f"{constants.ENDPOINT}/{name}"
    by_hand = f"fetch {page} (config.json, model.safetensors) where there is a network, and give its folder."
    try:
        config = fetch("config.json") / "config.json"
        if config.exists() and "architecture" not in read_json(config):
            read_config(config)  # before gigabytes of another kind of model are fetched
        folder = fetch("config.json", "model*.safetensors", "model.safetensors.index.json")
        if not any(folder.glob("model*.safetensors")):
            folder = fetch("config.json", "pytorch_model.bin")
    except UserError:
        raise
    except GatedRepoError as error:
        raise UserError(
            f"{name!r} is given only to those its owner allows; ask at {page}, and set HF_TOKEN."
        ) from error
    except (NotFoundError, HFValidationError) as error:
        raise UserError(
            f"{name!r} is no file or folder here, and the Hugging Face hub has no model of that name; {hint}"
        ) from error
    except LocalEntryNotFoundError as error:
        answer = getattr(getattr(error.__cause__, "response", None), "status_code", None)
        fault = f"the hub answers {answer}" if answer else "the hub cannot be reached"
        if constants.HF_HUB_OFFLINE:
            fault = "HF_HUB_OFFLINE is set"
        raise UserError(
            f"{name!r} is no file or folder here, is not in {constants.HF_HUB_CACHE}, and {fault}; "
            f"{hint if hint.startswith('did you mean') else by_hand}"
        ) from error
    # What else goes wrong on the way has other classes in each version of the client.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"Cannot download {name!r} from the hub ({reason}); try again, or {by_hand}"
        ) from error
    return folder
