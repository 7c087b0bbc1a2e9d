"""Buckets of a folder's files as pyarrow asks for them, served by another process.

pyarrow holds Python's lock while it waits for Google's storage, so a thread could not answer.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

from tests.checkpoint_tests import fake_buckets


class _Handler(fake_buckets._Handler):
    """Listings with sizes, and Google's descriptions of objects."""

    def _amazon(self, name: str, query: dict[str, str], body: bytes) -> None:
        if "list-type" not in query:
            return super()._amazon(name, query, body)
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{self._size(name, key)}</Size></Contents>"
            for key in self._keys(name, query)
        )
        content = f"<IsTruncated>false</IsTruncated>{entries}"
        self._answer(200, f"<ListBucketResult>{content}</ListBucketResult>".encode())

    def _google(self, path: str, query: dict[str, str], body: bytes) -> None:
        bucket, _, key = path.partition("/storage/v1/b/")[2].partition("/o")
        if "alt" in query:
            return super()._google(path, query, body)
        if key:
            found = self._described(bucket, key.strip("/"))
            return self._answer(200 if found else 404, json.dumps(found).encode())
        items = [self._described(bucket, found) for found in self._keys(bucket, query)]
        self._answer(200, json.dumps({"items": items}).encode())

    def _described(self, bucket: str, key: str) -> dict[str, str] | None:
        if f"{bucket}/{key}" not in self.server.objects:
            return None
        size = str(self._size(bucket, key))
        return {
            "kind": "storage#object", "bucket": bucket, "name": key, "size": size,
            "generation": "1", "metageneration": "1",
        }  # fmt: skip

    def _size(self, bucket: str, key: str) -> int:
        return len(self.server.objects[f"{bucket}/{key}"])


def serve(folder: Path) -> None:
    with fake_buckets.FakeBuckets() as server:
        server.RequestHandlerClass = _Handler
        for path in folder.rglob("*"):
            if path.is_file():
                server.objects[path.relative_to(folder).as_posix()] = path.read_bytes()
        print(server.url, flush=True)
        sys.stdin.read()  # until the one who started it ends


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address of a server of the folder, whose first steps are the buckets."""
    command = [sys.executable, "-m", "tests.data_tests.bucket_server", os.fspath(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2],
    ) as server:  # fmt: skip
        assert server.stdout is not None and server.stdin is not None
        yield server.stdout.readline().strip()
        server.stdin.close()


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
