"""A server that answers, stalls, is busy, talks nonsense or too much, over real sockets."""

import base64
import http.server
import io
import json
import threading
import time
from contextlib import contextmanager

import pytest
from PIL import Image as Pillow

from l32jax.align import endpoint
from l32jax.align.endpoint import Endpoint
from l32jax.align.prompts import Prompt
from l32jax.config import SamplingConfig
from l32jax.data.chat import Image, Message
from l32jax.data.records import Bad
from l32jax.errors import InputError
from tests.data_tests.pictures import png

SAMPLING = SamplingConfig(max_new_tokens=9, temperature=0.7, top_p=0.8, seed=3)
SECRET = "sk-very-secret"


class Server(http.server.ThreadingHTTPServer):
    """`reply` is called with the handler and the request, and returns (status, content)."""

    daemon_threads = True

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.requests, self.lock = reply, [], threading.Lock()
        self.address = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        """Clients that go are what is tested."""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, dict(self.headers), body))
        status, content = self.server.reply(self, body)
        self.send_response(status)
        for name, value in getattr(self, "more", {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


def completion(text="two", reason="stop", tokens=5) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    usage = {"completion_tokens": tokens}
    return json.dumps({"choices": [choice | {"finish_reason": reason}], "usage": usage}).encode()


def answering(handler, body):
    return 200, completion(f"{body['messages'][-1]['content']} {body['seed']}")


@contextmanager
def serving(reply=answering):
    with Server(reply) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr(endpoint, "BACK_OFF", 0.001)
    monkeypatch.delenv(endpoint.KEY_VARIABLE, raising=False)


def asked(*texts: str) -> list[tuple[Prompt, frozenset[int]]]:
    return [(Prompt((Message("user", text),), place=text), frozenset((0, 1))) for text in texts]


def client(server, **others) -> Endpoint:
    how = {"model": "big", "sampling": SAMPLING, "parallel": 4}
    return Endpoint(server.address, **how | others)


def told(found) -> dict[tuple[str, int], str]:
    return {(answer.prompt.place, answer.number): answer.text for (answer,) in found}


def in_turn(*replies):
    """One after the other; then it answers."""
    waiting = iter(replies)

    def reply(handler, body):
        status, content, more = next(waiting, (200, completion(), {}))
        handler.more = more
        return status, content

    return reply


def test_each_answer_is_asked_for_with_a_seed_of_its_own():
    with serving() as server:
        found = list(client(server).answers(asked("one", "other")))
        again = list(client(server, parallel=1).answers(asked("other")))
    assert told(found).keys() == {("one", 0), ("one", 1), ("other", 0), ("other", 1)}
    assert len(set(told(found).values())) == 4
    assert told(again).items() <= told(found).items()
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and "Authorization" not in headers
    assert body.pop("seed") < 1 << 31 and body.pop("messages")[0]["role"] == "user"
    assert body == {"model": "big", "n": 1, "max_tokens": 9, "temperature": 0.7, "top_p": 0.8}
    ((answer,),) = found[:1]
    assert answer.num_tokens == 5 and answer.finished


def test_pictures_go_with_the_question():
    content = (Image(png(28, 28)), "What?")
    messages = Message("system", "S"), Message("user", content), Message("ipython", "{}")
    with serving(in_turn()) as server:
        list(client(server).answers([(Prompt(messages), frozenset((0,)))]))
    system, user, tool = server.requests[0][2]["messages"]
    assert system == {"role": "system", "content": "S"} and tool["role"] == "tool"
    picture, text = user["content"]
    assert text == {"type": "text", "text": "What?"}
    kind, _, data = picture["image_url"]["url"].partition(";base64,")
    assert kind == "data:image/png" and base64.b64decode(data) == png(28, 28)
    assert Pillow.open(io.BytesIO(base64.b64decode(data))).size == (28, 28)


@pytest.mark.parametrize(
    ("content", "text", "finished"),
    [
        (completion("two", "length"), "two", False),
        (completion(None), "", True),
        (completion("\ud800"), "?", True),
        (b'{"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}]}', "a", True),
    ],
)
def test_replies_are_read_with_care(content, text, finished):
    with serving(in_turn((200, content, {}))) as server:
        ((answer,),) = client(server).answers([(asked("?")[0][0], frozenset((0,)))])
    assert (answer.text, answer.finished) == (text, finished)


GARBAGE = [
    b"", b"no JSON", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{}]}', b"\xff",
    b"[" * 100_000,
    b'{"choices": [{"message": {"content": 5}, "finish_reason": "stop"}]}',
    b'{"choices": [{"message": null, "finish_reason": "stop"}]}',
]  # fmt: skip


@pytest.mark.parametrize("content", GARBAGE, ids=range(len(GARBAGE)))
def test_nonsense_is_asked_again_and_told_if_it_stays(content):
    with serving(in_turn((200, content, {}))) as server:
        assert len(list(client(server).answers(asked("?")))) == 2
    with serving(lambda handler, body: (200, content)) as server:
        with pytest.raises(ConnectionError, match="no chat completion.*6 times"):
            list(client(server, parallel=1).answers(asked("?")))
        assert len(server.requests) >= endpoint.ATTEMPTS


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(status):
    with serving(in_turn((status, b"{}", {}), (status, b"", {"Retry-After": "0"}))) as server:
        assert len(list(client(server).answers(asked("?")))) == 2
    assert len(server.requests) == 4


def test_a_server_that_says_how_long_is_not_asked_before():
    with serving(in_turn((429, b"{}", {"Retry-After": "1"}))) as server:
        begun = time.monotonic()
        list(client(server, parallel=1).answers(asked("?")))
        assert 1 <= time.monotonic() - begun < 5


def test_dates_and_nonsense_about_how_long():
    soon = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 10))
    assert 5 < endpoint._retry_after(soon) < 11
    assert endpoint._retry_after("Thu, 01 Jan 1970 00:00:00 GMT") == 0
    for nonsense in (None, "", "soon", "nan", "-1", "1e400"):
        assert endpoint._retry_after(nonsense) is None


def test_connections_that_break_are_made_again():
    def hang_up(handler, body):
        if len(handler.server.requests) < 3:
            handler.connection.close()
        return 200, completion()

    with serving(hang_up) as server:
        assert len(list(client(server).answers(asked("?")))) == 2


def test_a_server_that_is_not_there_is_told(monkeypatch):
    with serving() as server:
        pass
    with pytest.raises(ConnectionError, match="refused, 6 times; what is done is kept"):
        list(client(server).answers(asked("?")))


def test_a_huge_reply_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(endpoint, "MAX_REPLY_BYTES", 1 << 20)
    with (
        serving(lambda handler, body: (200, b" " * (8 << 20))) as server,
        pytest.raises(InputError, match="more than 1048576 bytes"),
    ):
        list(client(server).answers(asked("?")))


def test_a_server_that_stalls_is_left(monkeypatch):
    monkeypatch.setattr(endpoint, "REPLY_SECONDS", 0.2)
    stalled = threading.Event()

    def stall(handler, body):
        if len(handler.server.requests) == 1:
            stalled.wait(30)
        return 200, completion()

    with serving(stall) as server:
        assert len(list(client(server, parallel=1).answers(asked("?")))) == 2
        stalled.set()


def test_a_reply_that_drips_is_left(monkeypatch):
    monkeypatch.setattr(endpoint, "REPLY_SECONDS", 0.3)

    def drip(handler, body):
        if len(handler.server.requests) == 1:
            handler.send_response(200)
            handler.end_headers()
            for _ in range(200):
                handler.wfile.write(b" ")
                time.sleep(0.05)
        return 200, completion()

    with serving(drip) as server:
        begun = time.monotonic()
        assert len(list(client(server, parallel=1).answers(asked("?")))) == 2
        assert time.monotonic() - begun < 5


def test_stopping_does_not_wait_for_the_server():
    stalled = threading.Event()

    def stall(handler, body):
        if body["messages"][-1]["content"] == "slow":
            stalled.wait(60)
        return 200, completion()

    with serving(stall) as server:
        answers = client(server, parallel=8).answers(asked("quick", "slow", "slow too"))
        next(answers)
        begun = time.monotonic()
        answers.close()
        assert time.monotonic() - begun < 5
        stalled.set()


def test_redirections_are_not_followed():
    with serving() as other:
        away = (302, b"", {"Location": f"{other.address}/chat/completions"})
        with serving(in_turn(away)) as server, pytest.raises(InputError, match="302.*address"):
            list(client(server, parallel=1).answers(asked("?")))
    assert not other.requests


def test_a_prompt_that_is_refused_costs_that_prompt():
    def reply(handler, body):
        if body["messages"][-1]["content"] == "long":
            return 400, b'{"error": {"message": "too\\nlong"}}'
        return 200, completion()

    with serving(reply) as server:
        found = list(client(server).answers(asked("a", "long", "b")))
    assert [answer for answer in found if isinstance(answer, Bad)] == [
        Bad("long", "the server refuses it: 400 too")
    ]
    assert len(found) == 5


def test_refusing_everything_ends_the_run():
    with (
        serving(lambda *_: (400, b'{"error": "no such model"}')) as server,
        pytest.raises(InputError, match="refuses all prompts: 400 no such model"),
    ):
        list(client(server).answers(asked(*map(str, range(30)))))
    assert len(server.requests) < 40


def test_the_key_goes_to_the_server_and_nowhere_else(monkeypatch):
    monkeypatch.setenv(endpoint.KEY_VARIABLE, SECRET)

    def reply(handler, body):
        return 401, json.dumps({"error": {"message": f"Incorrect key {SECRET}"}}).encode()

    with (
        serving(reply) as server,
        pytest.raises(InputError, match="401 Incorrect key …; set OPENAI_API_KEY") as error,
    ):
        list(client(server).answers(asked("?")))
    assert server.requests[0][1]["Authorization"] == f"Bearer {SECRET}"
    assert SECRET not in str(error.value) and SECRET not in json.dumps(server.requests[0][2])


def test_a_key_that_would_forge_headers_is_refused(monkeypatch):
    monkeypatch.setenv(endpoint.KEY_VARIABLE, f"{SECRET}\r\nX: y")
    with pytest.raises(InputError, match="it is no key") as error:
        Endpoint("http://host/v1", model="a", sampling=SAMPLING, parallel=1)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    "address",
    ["host:8000", "ftp://host", "file:///etc/passwd", "http://", "http://host:x", "http://host?a=b",
     "http://user:word@host/v1", ""],
)  # fmt: skip
def test_what_is_no_address_is_refused(address):
    with pytest.raises(InputError, match="endpoint") as error:
        Endpoint(address, model="a", sampling=SAMPLING, parallel=1)
    assert "user:word" not in str(error.value)


def test_what_the_protocol_cannot_say_is_refused():
    for sampling in (SamplingConfig(top_k=5), SamplingConfig(min_p=0.1)):
        with pytest.raises(InputError, match="the protocol has neither"):
            Endpoint("http://host/v1", model="a", sampling=sampling, parallel=1)
    with pytest.raises(InputError, match="--parallel 0"):
        Endpoint("http://host/v1", model="a", sampling=SAMPLING, parallel=0)


def test_a_picture_that_is_none_is_not_sent():
    prompt = Prompt((Message("user", (Image(b"x"), "?")),))
    found = Endpoint("http://host/v1", model="a", sampling=SAMPLING, parallel=1).fault(prompt)
    assert "not one of BMP" in found
