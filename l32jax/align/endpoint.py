"""Answers of a server that speaks OpenAI's chat completions; what it sends is not trusted."""

import base64
import contextlib
import email.utils
import hashlib
import http.client
import io
import json
import os
import random
import socket
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any
from urllib.parse import urlsplit

from PIL import Image as Pillow

from l32jax.align.prompts import Prompt, Wanted, encoded
from l32jax.align.sampling import Answer
from l32jax.config import SamplingConfig
from l32jax.data.chat import Image, Message
from l32jax.data.images import FORMATS, load_image
from l32jax.data.records import Bad
from l32jax.errors import InputError, one_line

KEY_VARIABLE = "OPENAI_API_KEY"
MAX_REPLY_BYTES = 16 << 20
CONNECT_SECONDS, REPLY_SECONDS = 10.0, 600.0
ATTEMPTS = 6
BACK_OFF = 1.0  # seconds before the second attempt; twice as long before each further one
MAX_WAIT = 300.0  # however long the server says
TEMPORARY = (408, 409, 425, 429, 500, 502, 503, 504)
OF_THE_PROMPT = (400, 413, 422)  # too long for the model, for one
MAX_REFUSED = 8  # prompts, while no answer has come: then it is not the prompts


class Trouble(Exception):
    """What may be over in a moment; `wait` is how long the server says, in seconds."""

    def __init__(self, why: str, wait: float | None = None):
        super().__init__(why)
        self.wait = wait


class Refused(Exception):
    """The server will not answer this prompt."""


class Stopped(Exception):
    """Nobody waits for the answer any more."""


class Endpoint:
    """A model on a server, asked for one answer a request, so that each has its own seed.

    The key of its owner is what OPENAI_API_KEY says, if anything; it goes into no file or message.
    Redirections are not followed.

    Args:
      address: such as http://host:8000/v1. model: its name there.
      parallel: requests at a time.
    """

    def __init__(self, address: str, *, model: str, sampling: SamplingConfig, parallel: int):
        self._address, self._model, self._sampling = address, model, sampling
        self._host, self._port, self._path, self._connect = _destination(address)
        if sampling.top_k or sampling.min_p:
            raise InputError(
                f"top_k={sampling.top_k} and min_p={sampling.min_p} for {address}: the protocol "
                "has neither; leave them out"
            )
        if parallel < 1:
            raise InputError(f"--parallel {parallel}: give at least 1")
        self._parallel, self._key = parallel, _key()
        self._open: set[socket.socket] = set()
        self._lock, self._stopping = threading.Lock(), threading.Event()
        self._has_answered = False

    def fault(self, prompt: Prompt) -> str | None:
        try:
            for image in prompt.images:
                load_image(image)
        except InputError as error:
            return one_line(error)
        return None

    def answers(self, wanted: Sequence[Wanted]) -> Generator[list[Answer] | Bad, None, None]:
        """Each answer as it comes.

        Raises:
          InputError: the server refuses the request itself, such as its key.
          ConnectionError: it has had trouble for all of some minutes.
        """
        refused: dict[str, str] = {}
        threads = ThreadPoolExecutor(self._parallel)
        try:
            asked = {
                threads.submit(self._answer, prompt, number): prompt
                for prompt, numbers in wanted
                for number in sorted(numbers)
            }
            for done in as_completed(asked):
                prompt = asked[done]
                try:
                    yield [done.result()]
                except Refused as error:
                    if prompt.key not in refused:
                        refused[prompt.key] = str(error)
                        self._check_refused(refused)
                        yield Bad(prompt.place, f"the server refuses it: {error}")
        finally:
            self._stop(threads)

    def _check_refused(self, refused: dict[str, str]) -> None:
        if len(refused) > MAX_REFUSED and not self._has_answered:
            why = next(iter(refused.values()))
            raise InputError(f"endpoint {self._address}: it refuses all prompts: {why}; change it")

    def _stop(self, threads: ThreadPoolExecutor) -> None:
        """Ends what nobody waits for: Python would wait for it when the process ends."""
        self._stopping.set()
        with self._lock:
            for connected in self._open:
                with contextlib.suppress(OSError):
                    connected.shutdown(socket.SHUT_RDWR)
        threads.shutdown(cancel_futures=True)
        self._stopping.clear()

    def _answer(self, prompt: Prompt, number: int) -> Answer:
        body = json.dumps(self._request(prompt, number)).encode()
        for attempt in range(ATTEMPTS):
            if self._stopping.is_set():
                raise Stopped
            try:
                found = _answer_in(self._post(body), prompt, number)
            except Trouble as trouble:
                last, wait = trouble, trouble.wait
            except (OSError, http.client.HTTPException) as error:
                last, wait = error, None
            else:
                self._has_answered = True
                return found
            if attempt + 1 < ATTEMPTS:
                grown = BACK_OFF * 2**attempt * random.uniform(0.5, 1)
                self._stopping.wait(grown if wait is None else min(wait, MAX_WAIT))
        raise ConnectionError(
            f"endpoint {self._address}: {one_line(last)}, {ATTEMPTS} times; what is done is kept, "
            "and the same command goes on"
        )

    def _request(self, prompt: Prompt, number: int) -> dict[str, Any]:
        sampling = self._sampling
        identity = f"{sampling.seed} {prompt.key} {number}"
        seed = int.from_bytes(hashlib.sha256(identity.encode()).digest()[:4]) >> 1
        return {
            "model": self._model,
            "messages": [_turn(message) for message in prompt.messages],
            "n": 1,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed,
        }

    def _post(self, body: bytes) -> bytes:
        """The content of a reply that went well."""
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        connection = self._connect(self._host, self._port, timeout=CONNECT_SECONDS)
        connection.connect()
        connected = connection.sock
        connected.settimeout(REPLY_SECONDS)
        with self._lock:
            self._open.add(connected)
        try:
            if self._stopping.is_set():  # sockets that were open then are shut down
                raise Stopped
            connection.request("POST", self._path, body, headers)
            response = connection.getresponse()
            return self._judged(response, self._read(response))
        finally:
            with self._lock:
                self._open.discard(connected)
            connection.close()

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        data, end = bytearray(), time.monotonic() + REPLY_SECONDS
        while piece := response.read1(1 << 16):
            data += piece
            if len(data) > MAX_REPLY_BYTES:
                raise InputError(
                    f"reply of {self._address}: more than {MAX_REPLY_BYTES} bytes; this is no "
                    "answer to a chat, so look at the server"
                )
            if time.monotonic() > end:
                raise Trouble(f"a reply takes more than {REPLY_SECONDS} s")
        return bytes(data)

    def _judged(self, response: http.client.HTTPResponse, data: bytes) -> bytes:
        status = response.status
        if status == 200:
            return data
        why = f"{status} {self._message(data) or response.reason}"
        if status in TEMPORARY:
            raise Trouble(why, _retry_after(response.getheader("Retry-After")))
        if status in OF_THE_PROMPT:
            raise Refused(why)
        hint = f"set {KEY_VARIABLE}" if status in (401, 403) else "check the address and the model"
        raise InputError(f"endpoint {self._address}: {why}; {hint}")

    def _message(self, data: bytes) -> str:
        """What the server says is wrong, in one line, without the key that it may repeat."""
        try:
            error = json.loads(data).get("error", "")
            text = str(error.get("message", "") if isinstance(error, dict) else error)
        except (ValueError, AttributeError, RecursionError):
            text = data[:200].decode("utf-8", "replace")
        text = text.replace(self._key, "…") if self._key else text
        return one_line(ValueError(text)) if text.strip() else ""


def _destination(address: str) -> tuple[str, int | None, str, Any]:
    """Host, port, path of the completions, and the class of connection."""
    kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError as error:
        raise InputError(f"endpoint {address!r}: {one_line(error)}; correct it") from None
    if parts.scheme not in kinds or not parts.hostname or parts.query or parts.fragment:
        raise InputError(f"endpoint {address!r}: it is no address; give one like http://host/v1")
    if parts.username is not None or parts.password is not None:
        raise InputError(f"endpoint at {parts.hostname}: it has a password; use {KEY_VARIABLE}")
    path = f"{parts.path.rstrip('/')}/chat/completions"
    return parts.hostname, port, path, kinds[parts.scheme]


def _key() -> str:
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"{KEY_VARIABLE} in the environment: it is no key; set it again")
    return key


def _retry_after(value: str | None) -> float | None:
    """Seconds, of a number of them or a date."""
    value = (value or "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (ValueError, OverflowError):
        return None


def _turn(message: Message) -> dict[str, Any]:
    role = "tool" if message.role == "ipython" else message.role
    if isinstance(message.content, str):
        return {"role": role, "content": message.content}
    return {"role": role, "content": [_part(part) for part in message.content]}


def _part(part: str | Image) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    data = encoded(part.source)
    with Pillow.open(io.BytesIO(data), formats=FORMATS) as image:
        kind = Pillow.MIME[str(image.format)]
    url = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def _answer_in(data: bytes, prompt: Prompt, number: int) -> Answer:
    try:
        reply = json.loads(data)
        (choice, *_) = reply["choices"]
        text = choice["message"].get("content") or ""
        finished = choice["finish_reason"] == "stop"
        usage = reply.get("usage") or {}
        num_tokens = usage.get("completion_tokens", 0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Trouble(f"a reply is no chat completion ({type(error).__name__})") from None
    if not isinstance(text, str) or not isinstance(num_tokens, int) or num_tokens < 0:
        raise Trouble("a reply is no chat completion")
    text = text.encode("utf-8", "replace").decode()  # JSON can spell half of a pair
    return Answer(prompt, number, text, num_tokens, finished)
