"""F-11 to F-15: whatever a reward server does, a batch ends by its deadline, and no reward is made up."""

import gzip
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from keel.config import RewardSource
from keel.endpoints.addresses import refuse_link_local
from keel.errors import ConfigError, RewardError
from keel.rollout.score import score
from keel.rollout.scorers import build_scorers

from ..rollout.answers import words

TOKENIZER, THREE = words("fine", "not so fine", "fine fine")
DEADLINE, SLACK = 1.0, 2.0
Mode = Callable[[socket.socket], None]


def answer(body: bytes, status: str = "200 OK", headers: str = "", length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\nContent-Length: {size}\r\n{headers}\r\n".encode() + body


def sends(*parts: bytes, pause: float = 0.0) -> Mode:
    def mode(connection: socket.socket) -> None:
        for part in parts:
            connection.sendall(part)
            time.sleep(pause)

    return mode


def drips(data: bytes) -> Mode:
    return sends(*(data[i : i + 1] for i in range(len(data))), pause=0.1)


def endless(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")


def resets(connection: socket.socket) -> None:
    connection.sendall(answer(b'{"rewa', length=100))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")


@contextmanager
def listening(*modes: Mode) -> Iterator[tuple[str, list[bytes]]]:
    """A server that meets one connection after the other with these modes, the last again and again."""
    asked: list[bytes] = []
    server = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket, mode: Mode) -> None:
        with connection:
            try:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += connection.recv(65536)
                head, _, body = head.partition(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                while len(body) < length:
                    body += connection.recv(65536)
                asked.append(head + b"\r\n\r\n" + body)
                mode(connection)
            except OSError:
                pass  # the other side has hung up

    def accept() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            mode = modes[min(len(asked), len(modes) - 1)]
            threading.Thread(target=serve, args=(connection, mode), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}/get_reward", asked
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()


def scores(url: str, timeout_seconds: float = DEADLINE) -> list[float]:
    scorers = build_scorers([RewardSource(url=url, timeout_seconds=timeout_seconds)])
    result: list[float] = score(THREE, scorers, TOKENIZER).scores.tolist()
    return result


GOOD = answer(b'{"rewards": [1.5, -1, 0.25]}')
BOMB = gzip.compress(b" " * 50_000_000)
SERVER_ERROR = answer(b"", "500 Internal Server Error")

# What ends at the deadline, because it might have passed.
PASSING: dict[str, Mode] = {
    "errors for ever": sends(SERVER_ERROR),
    "hangs after accept": sends(b"", pause=30.0),
    "a byte now and then": drips(GOOD),
    "headers for ever": drips(b"HTTP/1.1 200 OK\r\n" + b"X-More: 1\r\n" * 100),
    "resets in the body": resets,
    "ends before its length": sends(answer(b'{"rewards": [1, 2, 3]}', length=1000)),
    "speaks no HTTP": sends(b"220 mail ready\r\n"),
    "comes back much later": sends(answer(b"", "429 Too Many Requests", "Retry-After: 3600\r\n")),
}


@pytest.mark.parametrize("mode", list(PASSING))
def test_f11_it_ends_at_the_deadline(mode: str) -> None:
    with listening(PASSING[mode]) as (url, asked):
        began = time.monotonic()
        with pytest.raises(RewardError, match=r"no reply within 1 s \(\d attempts"):
            scores(url)
        assert time.monotonic() - began < DEADLINE + SLACK
        assert len(asked) <= 3


def test_f11_no_such_host() -> None:
    began = time.monotonic()
    with pytest.raises(RewardError, match="no reply within 1 s"):
        scores("http://no-such-host.invalid/")
    assert time.monotonic() - began < 15  # the system's resolver has its own patience


def test_f11_failures_that_pass() -> None:
    with listening(sends(SERVER_ERROR), resets, sends(GOOD)) as (url, asked):
        assert scores(url, timeout_seconds=20.0) == [1.5, -1.0, 0.25]
        assert len(asked) == 3


def test_f11_it_comes_back_when_the_server_says() -> None:
    with listening(sends(answer(b"", "429 Too Many Requests", "Retry-After: 2\r\n")), sends(GOOD)) as (url, _):
        began = time.monotonic()
        assert scores(url, timeout_seconds=20.0) == [1.5, -1.0, 0.25]
        assert 2.0 <= time.monotonic() - began < 4.0


VALUES = ["NaN", "Infinity", "-Infinity", "1e400", "9" * 400, '"0.7"', "true", "1e30", "null", "{}", '["a"]', "[[1]]"]


@pytest.mark.parametrize("value", VALUES)
def test_f12_what_is_no_reward(value: str) -> None:
    with listening(sends(answer(f'{{"rewards": [1, {value}, 2]}}'.encode()))) as (url, asked):
        with pytest.raises(RewardError, match=r"sample 1\b"):
            scores(url, timeout_seconds=20.0)
        assert len(asked) == 1


@pytest.mark.parametrize("rewards", ["[1, 2]", "[1, 2, 3, 4]", "[1]", "[]", "1", "null"])
def test_f13_a_wrong_number_of_rewards(rewards: str) -> None:
    with listening(sends(answer(f'{{"rewards": {rewards}}}'.encode()))) as (url, asked):
        with pytest.raises(RewardError, match=r"expected 3 rewards, got \d|expected a list of rewards"):
            scores(url, timeout_seconds=20.0)
        assert len(asked) == 1


GARBAGE: dict[str, Mode] = {
    "a page": sends(answer(b"<html>sorry</html>")),
    "broken UTF-8": sends(answer(b'{"rewards": [1, 2, 3], "\xff\xfe": 1}')),
    "nothing": sends(answer(b"")),
    "deep nesting": sends(answer(b'{"rewards": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")),
    "a gzip bomb": sends(answer(BOMB, headers="Content-Encoding: gzip\r\n")),
    "no gzip": sends(answer(b"{}", headers="Content-Encoding: gzip\r\n")),
    "without end": endless,
    "a redirect": sends(answer(b"", "307 Temporary Redirect", "Location: http://127.0.0.1:9/\r\n")),
}


@pytest.mark.parametrize("mode", list(GARBAGE))
def test_f14_garbage_is_refused_at_once(mode: str) -> None:
    with listening(GARBAGE[mode]) as (url, asked):
        with pytest.raises(RewardError, match=r"not JSON|larger than|compressed|HTTP 307"):
            scores(url, timeout_seconds=20.0)
        assert len(asked) == 1


def test_f15_a_batch_that_comes_again_carries_the_same_key() -> None:
    with listening(sends(SERVER_ERROR), sends(GOOD)) as (url, asked):
        scores(url, timeout_seconds=20.0)
        scores(url, timeout_seconds=20.0)
    keys = [line for request in asked for line in request.split(b"\r\n") if line.lower().startswith(b"idempotency-key")]
    assert keys[0] == keys[1] != keys[2]
    assert asked[0] == asked[1]


@pytest.mark.parametrize("url", ["http://user:word@127.0.0.1:9/", "http://127.0.0.1:9/get_reward?token=abc"])
def test_f34_no_secret_in_an_address(url: str) -> None:
    with pytest.raises(ConfigError, match=r"the address holds a secret, .* -> set the secret in KEEL_REWARD_TOKEN"):
        build_scorers([RewardSource(url=url)])


def test_f34_what_the_server_said_is_said() -> None:
    refusal = answer(b'{"error": "the token is missing or wrong"}', "401 Unauthorized")
    with listening(sends(refusal)) as (url, _), pytest.raises(RewardError) as caught:
        scores(url)
    assert str(caught.value).endswith(
        "HTTP 401 (the token is missing or wrong) -> set KEEL_REWARD_TOKEN to the server's token"
    )


def test_f15_the_token_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEEL_REWARD_TOKEN", "a secret of sixteen")
    with listening(sends(GOOD)) as (url, asked):
        scores(url)
    assert b"authorization: bearer a secret of sixteen" in asked[0].lower()
    assert json.loads(asked[0].partition(b"\r\n\r\n")[2])["prompts"] == ["Say:"] * 3


@pytest.mark.parametrize("token", ["s3cret of sixteen\n", "s3cret of s\u00efxteen"])
def test_f15_a_token_that_no_header_can_hold_is_refused_unseen(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEEL_REWARD_TOKEN", token)
    with pytest.raises(ConfigError, match="KEEL_REWARD_TOKEN: the key has a line break") as caught:
        build_scorers([RewardSource(url="http://127.0.0.1:9/")])
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    "host",
    [
        "169.254.169.254",
        "0xA9FEA9FE",
        "0xa9.0xfe.0xa9.0xfe",
        "0251.0376.0251.0376",
        "2852039166",
        "169.254.43518",
        "[::ffff:169.254.169.254]",
        "[::ffff:a9fe:a9fe]",
        "[fe80::1]",
        "[64:ff9b::a9fe:a9fe]",
        "[64:ff9b:1::169.254.169.254]",
        "[2002:a9fe:a9fe::1]",
        "[2001:0:a9fe:a9fe::]",
        "[2001:0:1::5601:5601]",
        "[::169.254.169.254]",
        "[::ffff:0:169.254.169.254]",
        "[2001:db8::5efe:169.254.169.254]",
    ],
)
def test_f35_link_local_addresses_are_refused_in_every_spelling(host: str) -> None:
    began = time.monotonic()
    with pytest.raises((RewardError, ConfigError), match=r"link-local|not an http\(s\) address"):
        scores(f"http://{host}/latest/meta-data", timeout_seconds=5.0)
    assert time.monotonic() - began < 4.0


@pytest.mark.parametrize(
    "host",
    [
        "100.100.100.200",
        "168.63.129.16",
        "192.0.0.192",
        "[fd00:ec2::254]",
        "[fd20:ce::254]",
        "[64:ff9b::100.100.100.200]",
    ],
)
def test_f35_metadata_of_other_clouds_is_refused(host: str) -> None:
    with pytest.raises(RewardError, match="metadata service"):
        scores(f"http://{host}/latest/meta-data", timeout_seconds=5.0)


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.5", "::1", "2001:db8::1", "fd00::5", "64:ff9b::8.8.8.8"])
def test_f35_other_addresses_are_not(address: str) -> None:
    with pytest.raises(RewardError, match=r"169\.254\.9\.9"):  # the first that is refused
        refuse_link_local([address, "169.254.9.9"], "http://x")


def test_f35_what_a_name_leads_to_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("169.254.169.254", 80))
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: [entry])
    with pytest.raises(RewardError, match="is a link-local address"):
        scores("http://rewards.example/get", timeout_seconds=5.0)


@pytest.mark.parametrize("host", ["127.1", "0x7f000001", "2130706433", "localhost"])
def test_f35_this_machine_may_be_spelled_as_one_likes(host: str) -> None:
    with listening(sends(GOOD)) as (url, _):
        assert scores(url.replace("127.0.0.1", host)) == [1.5, -1.0, 0.25]
