"""A folder of files on a disk, or below a prefix of a bucket: gs://bucket/prefix, s3://bucket/prefix.

S3-compatible servers are found by AWS_ENDPOINT_URL, GCS emulators by TENSORSTORE_GCS_HTTP_URL;
credentials are what the clouds' own tools use, or none for what is public.
"""

import functools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorstore as ts

from l32jax.checkpoint.failures import ReadError, SaveError, reason
from l32jax.checkpoint.fields import MAX_JSON_BYTES
from l32jax.errors import InputError

DRIVERS = {"gs": "gcs", "s3": "s3"}
RETRIES = {"max_retries": 5, "initial_delay": "500ms"}  # 15 s of trouble; then it has failed
UNREACHABLE = ("ABORTED", "UNAVAILABLE", "DEADLINE_EXCEEDED")


@functools.cache
def _shared() -> ts.Context:
    """Credentials and connections; nothing of what is read stays."""
    return ts.Context(
        {
            "cache_pool": {"total_bytes_limit": 0},
            "s3_request_retries": RETRIES,
            "gcs_request_retries": RETRIES,
        }
    )


def fresh_context(cache_bytes: int = 0) -> ts.Context:
    """For all that is to see one state of a checkpoint; that many bytes of chunks are kept."""
    return ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}}, _shared())


def is_remote(where: str | os.PathLike) -> bool:
    scheme, colon, _ = str(where).partition("://")
    return bool(colon) and scheme in DRIVERS


@dataclass(frozen=True)
class Folder:
    """Read and listed wherever it is; written only where it is remote.

    where: a path, or an address as in the examples above.
    """

    where: str

    @classmethod
    def at(cls, where: str | os.PathLike) -> "Folder":
        """InputError for an address without a bucket or a prefix."""
        if not is_remote(where):
            return cls(str(Path(where).absolute()))
        scheme, _, rest = str(where).partition("://")
        if not rest.strip("/").partition("/")[2]:
            raise InputError(
                f"address {str(where)!r}: no bucket and prefix; write it like {scheme}://bucket/run"
            )
        return cls(f"{scheme}://{rest.strip('/')}")

    @property
    def base(self) -> dict[str, Any]:
        """What tensorstore calls it."""
        if not is_remote(self.where):
            return {"driver": "file", "path": f"{self.where}/"}
        scheme, _, rest = self.where.partition("://")
        bucket, _, prefix = rest.partition("/")
        extra = _s3_server() if scheme == "s3" else {}
        return {"driver": DRIVERS[scheme], "bucket": bucket, "path": f"{prefix}/", **extra}

    def child(self, name: str) -> "Folder":
        return Folder(f"{self.where}/{name}")

    def names(self) -> list[str]:
        """Of every file below, relative."""
        with self.reading():
            return [name.decode() for name in self._store().list().result()]

    def read(self, name: str, at_most: int = MAX_JSON_BYTES) -> bytes | None:
        """A file's content, None if there is no such file. InputError if it is larger."""
        with self.reading():
            return read_at_most(self._store(), name, at_most, self.where)

    def read_json(self, name: str) -> dict[str, Any]:
        """InputError unless it is there, and a JSON object."""
        found = self.read(name)
        if found is None:
            raise InputError(f"checkpoint in {self.where}: it has no {name}; copy it again")
        try:
            content = json.loads(found)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"file {name!r} in {self.where}: not JSON ({error}); copy the checkpoint again"
            ) from None
        if not isinstance(content, dict):
            raise InputError(
                f"file {name!r} in {self.where}: not a JSON object; copy the checkpoint again"
            )
        return content

    def write(self, name: str, content: bytes) -> None:
        with self.writing():
            self._store().write(name, content).result()

    def remove(self) -> None:
        """Whatever is below."""
        with self.writing():
            self._store().delete_range(ts.KvStore.KeyRange()).result()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """What tensorstore has to say of the content, as an InputError, or of the way there.

        That is a ReadError: a conversion that was cut off from its source can go on later.
        """
        try:
            yield
        except (ValueError, OSError, NotImplementedError) as error:
            if isinstance(error, InputError):
                raise
            if str(error).startswith(UNREACHABLE):
                raise ReadError(
                    f"checkpoint in {self.where}: it cannot be reached ({reason(error)}); check "
                    "the network, and try again"
                ) from error
            raise InputError(
                f"checkpoint in {self.where}: {reason(error)}; check that it is there and whole"
            ) from error

    @contextmanager
    def writing(self) -> Iterator[None]:
        """What tensorstore has to say of the disk or the way there, as a SaveError."""
        try:
            yield
        except ValueError as error:
            raise SaveError(
                f"checkpoint in {self.where}: it could not be written ({reason(error)}); "
                "what is there already is kept"
            ) from error

    def _store(self) -> ts.KvStore:
        return ts.KvStore.open(self.base, context=_shared()).result()


def read_at_most(store: ts.KvStore, name: str, size: int, where: str) -> bytes | None:
    """A value, None if there is none. InputError if it is larger."""
    if _is_longer(store, name, size):
        raise InputError(f"file {name!r} in {where}: more than {size} bytes are not read of it")
    found = store.read(name).result()
    return found.value if found.state == "value" else None


def _is_longer(store: ts.KvStore, name: str, size: int) -> bool:
    """Asks for the byte behind the last that may be there: no listing has sizes."""
    try:
        return store.read(name, byte_range=slice(size, size + 1)).result().state == "value"
    except ValueError as error:
        if "OUT_OF_RANGE" in str(error):
            return False
        raise


def _s3_server() -> dict[str, Any]:
    spec: dict[str, Any] = {}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL"):
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        spec |= {"endpoint": endpoint.rstrip("/"), "aws_region": region or "us-east-1"}
    if os.environ.get("AWS_ACCESS_KEY_ID"):  # the long way round would complain of missing files
        spec["aws_credentials"] = {"type": "environment"}
    return spec
