"""What tensorstore needs of S3 and of Google's storage, served from a dict by a thread."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


class FakeBuckets(ThreadingHTTPServer):
    """`objects` by "bucket/key"; `requests` are (method, "bucket/key", range); use with `with`.

    With `broken` every request fails.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.broken = False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeBuckets
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # an answer in one packet; a second would wait for the first to be confirmed

    def log_message(self, *_) -> None: ...

    def handle_one(self) -> None:
        address = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(address.query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.broken:
            self._answer(403)
        elif "/storage/v1/b/" in address.path:
            self._google(unquote(address.path), query, body)
        else:
            self._amazon(unquote(address.path).strip("/"), query, body)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_one

    def _amazon(self, name: str, query: dict[str, str], body: bytes) -> None:
        if "list-type" in query:
            keys = "".join(
                f"<Contents><Key>{escape(key)}</Key><Size>1</Size></Contents>"
                for key in self._keys(name, query)
            )
            content = f"<IsTruncated>false</IsTruncated>{keys}"
            self._answer(200, f"<ListBucketResult>{content}</ListBucketResult>".encode())
        else:
            self._object(name, body)

    def _google(self, path: str, query: dict[str, str], body: bytes) -> None:
        upload, _, rest = path.partition("/storage/v1/b/")
        bucket, _, key = rest.partition("/o")
        name = f"{bucket}/{key.strip('/') or query.get('name', '')}"
        if upload:
            self._store(name, body)
            self._answer(200, json.dumps({"generation": "1", "name": query["name"]}).encode())
        elif not key:
            items = [{"name": key, "size": "1"} for key in self._keys(bucket, query)]
            self._answer(200, json.dumps({"items": items}).encode())
        else:
            self._object(name, body)

    def _keys(self, bucket: str, query: dict[str, str]) -> list[str]:
        keys = (name.removeprefix(f"{bucket}/") for name in list(self.server.objects))
        return sorted(
            key
            for key in keys
            if key.startswith(query.get("prefix", ""))
            and key > query.get("start-after", "")
            and query.get("startOffset", "") <= key < query.get("endOffset", "\U0010ffff")
        )

    def _store(self, name: str, body: bytes) -> None:
        self.server.requests.append(("PUT", name, None))
        self.server.objects[name] = body

    def _object(self, name: str, body: bytes) -> None:
        if self.command == "PUT":
            self._store(name, body)
            return self._answer(200, etag=hashlib.md5(body).hexdigest())
        wanted = self.headers.get("Range")
        self.server.requests.append((self.command, name, wanted))
        if self.command == "DELETE":
            self.server.objects.pop(name, None)
            return self._answer(204)
        content = self.server.objects.get(name)
        if content is None:
            return self._answer(404)
        etag = hashlib.md5(content).hexdigest()
        if wanted is None:
            return self._answer(200, content, etag=etag)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        begin, end = int(first), min(int(last or len(content) - 1), len(content) - 1)
        if begin >= len(content):
            return self._answer(416)
        range_ = f"bytes {begin}-{end}/{len(content)}"
        return self._answer(206, content[begin : end + 1], etag=etag, range_=range_)

    def _answer(self, code: int, body: bytes = b"", *, etag: str = "", range_: str = "") -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        if etag:
            self.send_header("ETag", f'"{etag}"')
            self.send_header("x-goog-generation", "1")
        if range_:
            self.send_header("Content-Range", range_)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
