"""ObjectStore: a bucket of an S3-compatible store, of Google Cloud Storage or of Azure, through the library obstore.

    put:     up to one part: one request. More: a multipart upload straight from the caller's memory, made visible by its last request
    stream:  parts are copied, sent while the next is filled, and made visible by `commit`

Invariants
- an object becomes visible by one request that names all its bytes: there is no partial object, whoever dies when;
- an exclusive put is one conditional request (If-None-Match: *), and it carries a token of its own: when the answer to a put that
  succeeded is lost, obstore sends it again and is told that the object exists; the token tells that it is ours;
- one `get` reads one version: pieces after the first ask for the first one's ETag;
- every request has a deadline and a bounded number of retries;
- no memory of the caller is referred to after a method has returned.

Credentials and endpoint come from the environment alone (README.md, "Object stores"), so a URL can be logged.

Things that don't work
- obstore after fork: its threads are gone and its epoll is shared with the parent. The child hangs, and then the parent (0.12.1). So
  children of a process that has used a store are refused; `spawn` them.
- obstore.put of a buffer: it copies every part. Of an iterator of buffers it copies none, but starts all parts of one item at once:
  so the items are no longer than a part.
- client_options: giving any drops those of the environment (AWS_ALLOW_HTTP); the same keys in `config` do not.
- HEAD, to tell a missing object from a missing bucket: its answers have no body. The bucket is listed, once.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeAlias

from ckptd.errors import BadArgument, CkptdError, NotFound, StoreFailed
from ckptd.storage import Data, Stat, Writer, check_name, parts_of

if TYPE_CHECKING:
    from obstore import GetOptions, GetResult
    from obstore.store import AzureStore, GCSStore, S3Store

__all__ = ["SCHEMES", "ObjectStore"]

SCHEMES = ("s3", "gs", "az")

PART_BYTES = 16 << 20
"""One part of an upload: as torch's and AWS's own clients have it (8 to 16 MiB). S3 wants 5 MiB at least."""
PARTS_MAX = 10_000
"""S3's and GCS's limit; larger objects get larger parts."""
UPLOADS = 8
"""Parts of one put under way at a time."""
STREAM_PART_BYTES = 32 << 20
"""A stream does not know its size: 32 MiB * PARTS_MAX allow 312 GiB."""
STREAM_UPLOADS = 3
"""Parts of one stream under way; with the one being filled and the one handed over a stream holds up to 160 MiB."""
PIECE_BYTES = 16 << 20
"""One ranged read; longer reads are several."""
DOWNLOADS = 4
"""Pieces of one get under way; each is held once by the library before it is copied to where it belongs."""
VERSIONS_MAX = 5
"""How often a get begins again because the object was replaced under it."""
CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 120.0
"""A part needs at least 0.14 MB/s. obstore's own default, 30 s, is too short for eight parts over a slow line."""
RETRY_TIMEOUT_S = 60.0
"""After that no request is sent again. So a method fails after the sum of both, per part."""
RETRIES = 6
RELEASE_TIMEOUT_S = 5.0
"""How long we wait for obstore's threads to let go of the caller's memory; it takes microseconds."""

_PUT_TOKEN = "ckptdput"  # noqa: S105  the metadata field; Azure allows letters, digits and underscores only
_CODE = re.compile(r"<Code>(\w+)</Code>|\"(?:code|reason)\": ?\"(\w+)\"")
_STATUS = re.compile(r"status code: (\d{3})")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,221}")
_NO_BUCKET = {"NoSuchBucket", "ContainerNotFound"}

_ENVIRONMENT = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (~/.aws is not read)",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_SERVICE_ACCOUNT",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or an AZURE_CLIENT_ID with its secret or token",
}
_ENDPOINT = {"s3": "AWS_ENDPOINT_URL", "gs": "GOOGLE_BASE_URL", "az": "AZURE_STORAGE_ENDPOINT"}

# Inside the class `list` is the method.
_Slices: TypeAlias = list[memoryview]


class _Fork:
    """Whether obstore's threads run in this process, or ran in one that it was forked from."""

    used = False
    lost = False

    @classmethod
    def in_child(cls) -> None:
        cls.lost = cls.lost or cls.used


os.register_at_fork(after_in_child=_Fork.in_child)


class ObjectStore:
    """A `Store` of the objects below `url`: s3://bucket/prefix, gs://bucket/prefix, or az://container/prefix.

    `request_timeout_s` bounds one request, `retry_timeout_s` how long after its start it is still sent again.
    Raises BadArgument: the URL, the environment's settings, or no obstore.
    """

    def __init__(self, url: str, *, request_timeout_s: float = REQUEST_TIMEOUT_S, retry_timeout_s: float = RETRY_TIMEOUT_S) -> None:
        self._scheme, self._bucket, self._prefix = _split(url)
        self._bucket_seen = False
        _check_fork()
        try:
            import obstore
            from obstore.exceptions import BaseError
        except ImportError as e:
            msg = f"{url} needs the library obstore"
            raise BadArgument(msg, remedy="pip install 'ckptd[objects]'") from e
        self._obstore, self._error = obstore, BaseError
        try:
            self._store = _connect(self._scheme, self._bucket, request_timeout_s, retry_timeout_s)
        except (BaseError, ValueError) as e:
            msg = f"cannot open {self}: {_first_line(e)}"
            raise BadArgument(
                msg, remedy=f"look at {_ENVIRONMENT[self._scheme]} and {_ENDPOINT[self._scheme]} in the environment"
            ) from e

    def __str__(self) -> str:
        return "/".join([f"{self._scheme}://{self._bucket}", *self._prefix])

    def put(self, name: str, data: Data, *, exclusive: bool = False) -> None:
        """See `Store.put`. An exclusive put is a single request, which S3 takes up to 5 GB."""
        key, parts = self._key(name), parts_of(data)
        size = sum(map(len, parts))
        part_bytes = max(PART_BYTES, -(-size // PARTS_MAX))
        slices: _Slices = []
        token = secrets.token_hex(16)
        with self._explained("write", name):
            try:
                if exclusive:
                    self._obstore.put(
                        self._store,
                        key,
                        _cut(parts, part_bytes, slices),
                        mode="create",
                        use_multipart=False,
                        attributes={_PUT_TOKEN: token},
                    )
                else:
                    self._obstore.put(
                        self._store,
                        key,
                        _cut(parts, part_bytes, slices),
                        use_multipart=size > part_bytes,
                        chunk_size=part_bytes,
                        max_concurrency=UPLOADS,
                    )
            except self._obstore.exceptions.AlreadyExistsError as e:
                if not self._is_ours(key, token):
                    msg = f"cannot write {self}/{name}: it exists already"
                    raise StoreFailed(msg, remedy="what is committed is never replaced") from e
            finally:
                _let_go(slices)

    def get(self, name: str, begin: int, into: memoryview) -> None:
        """See `Store.get`."""
        key = self._key(name)
        if begin < 0 or into.readonly or not into.c_contiguous:
            msg = f"{name}: cannot read from byte {begin} into {'read-only ' if into.readonly else ''}memory"
            raise BadArgument(msg)
        if not into.nbytes:
            self.stat(name)
            return None
        with self._explained("read", name):
            for _ in range(VERSIONS_MAX):
                with suppress(self._obstore.exceptions.PreconditionError):
                    return self._get_version(name, key, begin, into.cast("B"))
        msg = f"cannot read {self}/{name}: it was replaced {VERSIONS_MAX} times while it was read"
        raise StoreFailed(msg)

    def list(self, prefix: str) -> Iterator[Stat]:
        """See `Store.list`."""
        folder = "/".join([*self._prefix, *(check_name(prefix) if prefix else [])])
        found: list[Stat] = []
        with self._explained("list", prefix):
            for chunk in self._obstore.list(self._store, folder or None, chunk_size=1000):
                for meta in chunk:
                    name = self._name(meta["path"])
                    if name is not None:
                        found.append(Stat(name, meta["size"]))
            self._bucket_seen = True
        return iter(sorted(found))

    def delete(self, name: str) -> None:
        """See `Store.delete`."""
        key = self._key(name)
        with suppress(NotFound), self._explained("delete", name):
            self._obstore.delete(self._store, key)

    def stat(self, name: str) -> Stat:
        """See `Store.stat`."""
        key = self._key(name)
        with self._explained("stat", name):
            return Stat(name, self._obstore.head(self._store, key)["size"])

    def stream(self, name: str) -> Writer:
        """See `Streaming.stream`. Holds at most 160 MiB; up to 312 GiB."""
        key = self._key(name)
        file = self._obstore.open_writer(self._store, key, buffer_size=STREAM_PART_BYTES, max_concurrency=STREAM_UPLOADS)
        return _ObjectWriter(f"{self}/{name}", file, lambda: self._explained("write", name))

    def _get_version(self, name: str, key: str, begin: int, view: memoryview) -> None:
        """Fill `view` from one version of the object. Raises PreconditionError if it is replaced meanwhile."""
        first = view[:PIECE_BYTES]
        try:
            got = self._fetch(key, begin, len(first))
        except self._error as e:
            if _status(e) != "416":
                raise
            raise self._short(name, self._obstore.head(self._store, key)["size"], begin, len(view)) from e
        if begin + len(view) > got.meta["size"]:
            raise self._short(name, got.meta["size"], begin, len(view))
        etag = got.meta["e_tag"]
        first[:] = memoryview(got.bytes())

        def fill(at: int) -> None:
            piece = view[at : at + PIECE_BYTES]
            piece[:] = memoryview(self._fetch(key, begin + at, len(piece), etag).bytes())

        rest = range(len(first), len(view), PIECE_BYTES)
        if rest:
            with ThreadPoolExecutor(min(DOWNLOADS, len(rest)), "ckptd-get") as pool:
                for _ in pool.map(fill, rest):
                    pass

    def _fetch(self, key: str, begin: int, size: int, etag: str | None = None) -> GetResult:
        options: GetOptions = {"range": (begin, begin + size)}
        if etag is not None:
            options["if_match"] = etag
        return self._obstore.get(self._store, key, options=options)

    def _short(self, name: str, size: int, begin: int, wanted: int) -> StoreFailed:
        msg = f"{self}/{name}: short read: {max(0, size - begin)} of {wanted} bytes at byte {begin}"
        return StoreFailed(msg, remedy="the object is shorter than it was: restore another step, or from another tier")

    def _is_ours(self, key: str, token: str) -> bool:
        """Whether the object that stands in the way of an exclusive put is what that put has just written."""
        with suppress(self._error, OSError):
            return self._obstore.get(self._store, key, options={"head": True}).attributes.get(_PUT_TOKEN) == token
        return False

    def _key(self, name: str) -> str:
        _check_fork()
        return "/".join([*self._prefix, *check_name(name)])

    def _name(self, key: str) -> str | None:
        """The name of a key; None if no put of ours could have made it."""
        name = key.removeprefix("/".join([*self._prefix, ""]) if self._prefix else "")
        try:
            check_name(name)
        except BadArgument:
            return None
        return name

    @contextmanager
    def _explained(self, verb: str, name: str) -> Iterator[None]:
        """Turn what the service says into our errors, with the URL and what to do about it."""
        _check_fork()
        what = f"{self}/{name}" if name else str(self)
        try:
            yield
        except CkptdError:
            raise
        except (FileNotFoundError, self._error) as e:
            raise self._meaning(verb, what, e) from e
        except ValueError as e:  # of obstore: the name is no path to it (control characters)
            msg = f"cannot {verb} {what!r}: {_first_line(e)}"
            raise BadArgument(msg) from e
        except (OSError, NotImplementedError) as e:  # OSError: how obstore's writers report what others raise as BaseError
            raise self._meaning(verb, what, e) from e

    def _meaning(self, verb: str, what: str, error: Exception) -> CkptdError:
        code, missing = _code(error), isinstance(error, FileNotFoundError)
        if code in _NO_BUCKET or (missing and not code and self._bucket_missing()):
            bucket = f"{self._scheme}://{self._bucket}"
            return StoreFailed(
                f"cannot {verb} {what}: there is no bucket {bucket}", remedy=f"create {bucket}, or mend the store's URL"
            )
        if missing and verb != "write":
            return NotFound(f"{what} does not exist")
        return StoreFailed(f"cannot {verb} {what}: {_first_line(error)}", remedy=self._remedy(str(error), _status(error)))

    def _bucket_missing(self) -> bool:
        """Asked when something does not exist: is it only that? One listing per store, until one succeeds."""
        if not self._bucket_seen:
            try:
                next(iter(self._obstore.list(self._store, "/".join(self._prefix) or None, chunk_size=1)), None)
            except self._error as e:
                return _code(e) in _NO_BUCKET
            except FileNotFoundError:
                return True
            self._bucket_seen = True
        return False

    def _remedy(self, text: str, status: str) -> str:
        environment, endpoint = _ENVIRONMENT[self._scheme], _ENDPOINT[self._scheme]
        if "169.254.169.254" in text or "metadata.google.internal" in text:
            return f"no credentials were found: set {environment}, or give this machine a role"
        if status in {"401", "403"}:
            return f"the credentials are wrong or lack a right: look at {environment}; reading, writing, listing and deleting are needed"
        if "builder error" in text:
            return (
                f"{endpoint} is no https URL; for plain http set {'AWS_ALLOW_HTTP' if self._scheme == 's3' else 'ALLOW_HTTP'}=true"
            )
        if "error sending request" in text:
            return f"the service does not answer: look at {endpoint}, the network and the proxy (HTTPS_PROXY), and try again"
        if status == "429" or status.startswith("5"):
            return "the service is overloaded or broken: try again later, or use another store"
        return "the service refused: its answer is above"


class _ObjectWriter(Writer):
    """Fills parts and hands them to obstore's writer, which sends some at a time and holds the rest of us back."""

    def __init__(self, what: str, file: Any, explained: Callable[[], Any]) -> None:
        super().__init__(what)
        self._file, self._explained = file, explained
        self._part = bytearray()
        self._sent = 0

    def _write(self, data: memoryview) -> None:
        while data:
            taken = data[: STREAM_PART_BYTES - len(self._part)]
            self._part += taken
            data = data[len(taken) :]
            if len(self._part) == STREAM_PART_BYTES:
                self._send()

    def _commit(self) -> None:
        if self._part:
            self._send()
        with self._explained():
            self._file.close()

    def _abort(self) -> None:
        self._part = bytearray()
        with suppress(Exception):  # what the abort cannot remove, the bucket's lifecycle rule does; nothing of it is visible
            self._file.__exit__(InterruptedError, InterruptedError(), None)

    def _send(self) -> None:
        if self._sent == PARTS_MAX:
            msg = f"cannot write {self}: it is longer than {STREAM_PART_BYTES * PARTS_MAX} bytes"
            raise StoreFailed(msg, remedy="write several objects")
        part, self._part = self._part, bytearray()
        self._sent += 1
        with self._explained():
            self._file.write(part)


def _split(url: str) -> tuple[str, str, list[str]]:
    """(scheme, bucket, components of the prefix)."""
    scheme, found, rest = url.partition("://")
    bucket, _, prefix = rest.partition("/")
    prefix = prefix.rstrip("/")
    remedy = (
        "give s3://bucket/prefix, gs://bucket/prefix or az://container/prefix; credentials and endpoint come from the environment"
    )
    if not found or scheme not in SCHEMES or not _BUCKET.fullmatch(bucket) or "?" in url or "#" in url:
        where = f"{scheme}://{bucket.rpartition('@')[2]}" if found else url  # what precedes an @ may be a secret
        msg = f"{where.partition('?')[0]!r} is no URL of an object store"
        raise BadArgument(msg, remedy=remedy)
    try:
        return scheme, bucket, check_name(prefix) if prefix else []
    except BadArgument as e:
        raise BadArgument(e.message, remedy=remedy) from e


def _connect(scheme: str, bucket: str, request_timeout_s: float, retry_timeout_s: float) -> S3Store | GCSStore | AzureStore:
    from obstore import store

    _Fork.used = True
    config: Any = {"timeout": f"{request_timeout_s * 1000:.0f}ms", "connect_timeout": f"{CONNECT_TIMEOUT_S * 1000:.0f}ms"}
    retry: Any = {
        "max_retries": RETRIES,
        "retry_timeout": timedelta(seconds=retry_timeout_s),
        "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 2},
    }
    if scheme == "s3":
        return store.S3Store(bucket, config=config, retry_config=retry)
    if scheme == "gs":
        return store.GCSStore(bucket, config=config, retry_config=retry)
    return store.AzureStore(bucket, config=config, retry_config=retry)


def _check_fork() -> None:
    if _Fork.lost:
        msg = "object stores cannot be used in a process forked from one that has used them"
        raise StoreFailed(msg, remedy='start the process anew: subprocess, or multiprocessing\'s "spawn"')


def _cut(parts: Sequence[memoryview], part_bytes: int, slices: _Slices) -> Iterator[memoryview]:
    """`parts` in slices of at most `part_bytes`, remembered in `slices` so that they can be taken back."""
    for part in parts:
        for at in range(0, len(part), part_bytes):
            slices.append(part[at : at + part_bytes])
            yield slices[-1]


def _let_go(slices: Sequence[memoryview]) -> None:
    """Wait until obstore's threads hold none of the caller's memory, so that the caller may unmap it."""
    deadline_s = time.monotonic() + RELEASE_TIMEOUT_S
    for view in slices:
        while True:
            try:
                view.release()
                break
            except BufferError:
                if time.monotonic() > deadline_s:
                    return
                time.sleep(0.0005)


def _code(error: Exception) -> str:
    """The service's word for an error, as "NoSuchBucket"; "" if it gave none."""
    found = _CODE.search(str(error))
    return (found[1] or found[2]) if found else ""


def _status(error: Exception) -> str:
    found = _STATUS.search(str(error))
    return found[1] if found else ""


_CAUSES = (
    ("ConnectionRefused", "connection refused"),
    ("dns error", "the host's name cannot be looked up"),
    ("kind: Timeout", "timed out"),
    ("InvalidCertificate", "the certificate is not trusted"),
    ("InvalidContentType", "the server does not speak TLS"),
)
"""What obstore tells in its debug text only, and what that means."""


def _first_line(error: Exception) -> str:
    """What a person wants to read of obstore's errors: the request and the service's code, without pages of debug text."""
    text = str(error)
    line = text.partition("\n")[0].partition(" <?xml")[0].strip().rstrip(":")
    causes = [meaning for sign, meaning in _CAUSES if sign in text]
    return ": ".join([line, *filter(None, [_code(error)]), *causes[:1]])
