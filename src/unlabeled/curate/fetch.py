"""One image from one URL, from a server that may be hostile: every wait, size, hop and address is limited.

Names are resolved here, their addresses checked, and the connection made to an address that was checked, at every
hop: a name that means another address a moment later (DNS rebinding) is of no use to a server. Proxies of the
environment are not used.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import httpcore2

from unlabeled.curate.output import image_suffix
from unlabeled.curate.recipe import CollectRecipe

AGENT = "unlabeled/0.1 (image collection; honours X-Robots-Tag)"
CHUNK = 65536  # bytes decompressed at once
REDIRECTS = (301, 302, 303, 307, 308)
AGAIN = (408, 429, 500, 502, 503, 504)  # answers after which the same may be asked again
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_UNICAST = ipaddress.ip_network("2000::/3")  # all of IPv6 that leads anywhere on the public internet
# Blocks of protocols and of examples: which of their addresses `is_global` counts hangs on Python's release.
_SPECIAL = [ipaddress.ip_network(block) for block in ("192.0.0.0/24", "2001::/23", "3fff::/20")]


class FetchError(Exception):
    """No image came of a URL; the text says why.

    kind: a word to count by. again: whether another try may help. wait: seconds the server asks for.
    """

    def __init__(self, kind: str, text: str, *, again: bool = False, wait: float = 0.0) -> None:
        super().__init__(text)
        self.kind, self.again, self.wait = kind, again, wait


@dataclass(frozen=True)
class Fetched:
    """An image as it came: its bytes, the suffix they call for, and the URL after redirects."""

    data: bytes
    suffix: str
    url: str


class Fetcher:
    """Fetches images; may be used from many threads at once."""

    def __init__(self, recipe: CollectRecipe) -> None:
        self.recipe = recipe
        self.backend = _Guarded(recipe.allow_private)
        self.pool = httpcore2.ConnectionPool(
            max_connections=recipe.connections + 1, keepalive_expiry=5.0, network_backend=self.backend
        )

    def close(self) -> None:
        """Close all connections."""
        self.pool.close()

    def fetch(self, url: str) -> Fetched:
        """Return the image at a URL. Raises FetchError."""
        self.backend.start(self.recipe.timeout)
        seen = {url}
        for _ in range(self.recipe.max_redirects + 1):
            target = self._hop(url)
            if isinstance(target, Fetched):
                return target
            if target in seen:
                raise FetchError("redirects", f"redirects go round in a circle at {target}")
            seen.add(target)
            url = target
        raise FetchError("redirects", f"more than {self.recipe.max_redirects} redirects")

    def _hop(self, url: str) -> Fetched | str:
        """The image, or where a redirect leads."""
        parts = _checked(url, self.recipe)
        try:
            with self.pool.stream("GET", parts, headers=_headers(parts)) as response:
                return self._answer(url, response)
        except FetchError:
            raise
        except (httpcore2.TimeoutException, TimeoutError) as error:
            raise FetchError("timeout", f"took more than {self.recipe.timeout:g} s", again=True) from error
        except (httpcore2.NetworkError, httpcore2.ProtocolError, OSError) as error:
            refused = error.__cause__ or error.__context__
            if isinstance(refused, FetchError):
                raise refused from error
            text = " ".join(str(error).split()) or type(error).__name__
            raise FetchError("connection", f"the connection failed: {text}", again=True) from error

    def _answer(self, url: str, response: httpcore2.Response) -> Fetched | str:
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers
        }
        status = response.status
        if status in REDIRECTS:
            if not headers.get("location"):
                raise FetchError("redirects", f"answers {status} without a place to go")
            return urljoin(url, headers["location"].strip())
        if status != 200:
            pause = _seconds(headers.get("retry-after"))
            raise FetchError(f"status {status}", f"answers {status}", again=status in AGAIN, wait=pause)
        robots = headers.get("x-robots-tag", "").lower()
        if self.recipe.honour_noai and any(
            word.strip() in ("noai", "noimageai") for word in robots.split(",")
        ):
            raise FetchError("noai", "its X-Robots-Tag forbids machine learning")
        most = self.recipe.max_bytes
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > most:
            raise FetchError("size", f"has {int(length):,} bytes, and {most:,} are allowed")
        data = _body(response, headers.get("content-encoding", "identity").lower().strip(), most)
        suffix = image_suffix(data)
        if suffix is None:
            kind = headers.get("content-type", "no type")
            raise FetchError("type", f"is no image that is read ({kind}, begins with {data[:12]!r})")
        return Fetched(data, suffix, url)


def _body(response: httpcore2.Response, encoding: str, most: int) -> bytes:
    """The body, decompressed where a server compresses unasked; never more than `most` bytes of it are held."""
    if encoding not in ("identity", "", "gzip", "x-gzip", "deflate"):
        raise FetchError("encoding", f"is compressed by {encoding}, which was not asked for")
    inflate = (
        zlib.decompressobj(wbits=47 if "gzip" in encoding else 15)
        if encoding not in ("identity", "")
        else None
    )
    parts, held = [], 0
    for received in response.iter_stream():
        waiting = received
        while waiting:
            if inflate is None:
                piece, waiting = waiting, b""
            else:
                try:
                    piece = inflate.decompress(waiting, CHUNK)
                except zlib.error as error:
                    raise FetchError("encoding", f"is compressed wrongly: {error}") from error
                waiting = inflate.unconsumed_tail
            held += len(piece)
            if held > most:
                raise FetchError("size", f"has more than the {most:,} bytes that are allowed")
            parts.append(piece)
    return b"".join(parts)


def _checked(url: str, recipe: CollectRecipe) -> httpcore2.URL:
    """A URL for the connection pool. Raises FetchError where its scheme or host is not allowed."""
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port
        ascii_host = host if host.isascii() else host.encode("idna").decode()
    except (ValueError, UnicodeError) as error:
        raise FetchError("url", f"is no URL: {error}") from error
    if parts.scheme not in ("http", "https") or not ascii_host:
        raise FetchError("url", f"is no http or https URL: {url[:80]!r}")
    if recipe.hosts and not _among(ascii_host, recipe.hosts):
        raise FetchError("host", f"{host} is not among the allowed hosts")
    if _among(ascii_host, recipe.not_hosts):
        raise FetchError("host", f"{host} is among the hosts to leave out")
    # What is not ASCII is percent-encoded; what already is stays.
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._[]")
    query = quote(parts.query, safe="/%:@!$&'()*+,;=~-._?[]")
    target = path + (f"?{query}" if query else "")
    return httpcore2.URL(scheme=parts.scheme, host=ascii_host, port=port, target=target)


def _among(host: str, names: Iterable[str]) -> bool:
    """Whether a host is one of some, or a subdomain of one."""
    return any(host.lower() == name.lower() or host.lower().endswith(f".{name.lower()}") for name in names)


def _headers(url: httpcore2.URL) -> list[tuple[bytes, bytes]]:
    host = url.host.decode()
    host = f"[{host}]" if ":" in host else host
    place = host if url.port is None else f"{host}:{url.port}"
    return [
        (b"Host", place.encode()),
        (b"User-Agent", AGENT.encode()),
        (b"Accept", b"image/*"),
        (b"Accept-Encoding", b"identity"),
    ]


def _seconds(text: str | None) -> float:
    """What a Retry-After header asks for: seconds, or a date."""
    if not text:
        return 0.0
    if text.strip().isdigit():
        return float(text)
    from email.utils import parsedate_to_datetime

    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0


def is_public(address: str) -> bool:
    """Whether an IP address is of the public internet; IPv4 inside IPv6 counts as what it leads to."""
    one = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(one, ipaddress.IPv6Address):
        inner = one.ipv4_mapped or one.sixtofour or (one.teredo[1] if one.teredo else None)
        if inner is None and one in _NAT64:
            inner = ipaddress.IPv4Address(int(one) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if one not in _UNICAST:
            return False
    return one.is_global and not one.is_multicast and not any(one in block for block in _SPECIAL)


class _Guarded(httpcore2.NetworkBackend):
    """Connects to checked addresses only, and ends everything at a thread's deadline."""

    def __init__(self, allow_private: bool) -> None:
        self.allow_private = allow_private
        self.inner = httpcore2.SyncBackend()
        self.local = threading.local()

    def start(self, seconds: float) -> None:
        """Begin the time of this thread's next image."""
        self.local.deadline = time.monotonic() + seconds

    def left(self, timeout: float | None = None) -> float:
        """Seconds of this thread's image that are left. Raises httpcore2.ReadTimeout where none are."""
        left: float = self.local.deadline - time.monotonic()
        if left <= 0:
            raise httpcore2.ReadTimeout("no time left")
        return left if timeout is None else min(left, timeout)

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Any = None,
    ) -> httpcore2.NetworkStream:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise FetchError("name", f"the name {host} cannot be resolved: {error}", again=True) from error
        addresses = list(dict.fromkeys(str(one[4][0]) for one in found))
        allowed = [one for one in addresses if self.allow_private or is_public(one)]
        if not allowed:
            raise FetchError("address", f"{host} is at {addresses[0]}, which is no public address")
        for number, address in enumerate(allowed, 1):
            try:
                stream = self.inner.connect_tcp(
                    address, port, self.left(timeout), local_address, socket_options
                )
                return _Timed(stream, self)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                if number == len(allowed):
                    raise
        raise AssertionError("unreachable")

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class _Timed(httpcore2.NetworkStream):
    """A stream of which every operation ends at the deadline of the thread that uses it."""

    def __init__(self, inner: httpcore2.NetworkStream, backend: _Guarded) -> None:
        self.inner, self.backend = inner, backend

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self.inner.read(max_bytes, self.backend.left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self.inner.write(buffer, self.backend.left(timeout))

    def close(self) -> None:
        self.inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        return _Timed(
            self.inner.start_tls(ssl_context, server_hostname, self.backend.left(timeout)), self.backend
        )

    def get_extra_info(self, info: str) -> Any:
        return self.inner.get_extra_info(info)
