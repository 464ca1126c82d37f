"""F-16, F-17: whatever is in a data or settings file, it is one clear line or every row is used; never a traceback."""

import json
import os
import random
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from keel import files
from keel.cli.settings import read_yaml
from keel.config import DpoConfig, EvaluateConfig, RewardConfig, SampleConfig, SftConfig, TrainConfig, parse
from keel.data import rows
from keel.data.examples import ExampleFormat, load_examples
from keel.data.preferences import load_rankings
from keel.data.prompts import load_prompts
from keel.data.rows import read_rows
from keel.errors import ConfigError, DataError
from keel.evaluation.gate import read_gate
from keel.models.loading import load_tokenizer

from ..runs import settings

GOOD: dict[str, list[dict[str, Any]]] = {
    "prompts": [{"prompt": "w1 w2", "id": i} for i in range(5)],
    "pairs": [{"prompt": f"w{i}", "chosen": "w1", "rejected": "w2"} for i in range(5)],
    "rankings": [{"prompt": f"w{i}", "responses": ["w1", "w2", "w3"], "ranks": [1, 2, 3]} for i in range(5)],
    "texts": [{"prompt": f"w{i}", "completion": "w1 w2"} for i in range(5)],
}


@pytest.fixture(scope="module")
def readers(tiny_policy: Path) -> dict[str, Callable[[str], int]]:
    """For each kind of file, how many rows its reader made of it."""
    tokenizer = load_tokenizer(str(tiny_policy))
    return {
        "prompts": lambda path: len(load_prompts(path, tokenizer, max_tokens=64)),
        "pairs": lambda path: len(load_rankings(path)),
        "rankings": lambda path: len(load_rankings(path)),
        "texts": lambda path: len(load_examples(path, ExampleFormat(tokenizer, [2], 64))[0]),
    }


STRANGE: list[Any] = [None, True, -1, 1e308, "", " ", "\x00", "\ufeff", "é" * 50, [], {}, [[]], [None],
                      {"role": "user"}, [{"role": "user", "content": 1}], ["w1"] * 40, "w1 " * 500]  # fmt: skip


def outcome(read: Callable[[], Any]) -> tuple[Any, str | None]:
    """What was read, or why it was refused. Any other error is the test's."""
    try:
        return read(), None
    except (ConfigError, DataError) as error:
        return None, str(error)


def mutated(row: dict[str, Any], draw: random.Random) -> bytes:
    """A line near a good one."""
    row = json.loads(json.dumps(row))
    kind = draw.randrange(6)
    if kind == 0:
        row[draw.choice(list(row))] = draw.choice(STRANGE)
    elif kind == 1:
        row.pop(draw.choice(list(row)))
    elif kind == 2:
        name = draw.choice(list(row))
        row[name + draw.choice(["s", "_", " "])] = row.pop(name)
    elif kind == 3 and any(isinstance(value, list) for value in row.values()):
        values = draw.choice([value for value in row.values() if isinstance(value, list)])
        values[draw.randrange(len(values))] = draw.choice(STRANGE)
    line = bytearray(json.dumps(row, ensure_ascii=draw.random() < 0.5).encode())
    if kind == 4:
        line[draw.randrange(len(line))] = draw.randrange(256)
    elif kind == 5:
        line = line[: draw.randrange(len(line))]
    return bytes(line).replace(b"\n", b" ")


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(GOOD))
def test_f17_five_thousand_mutated_lines(kind: str, readers: dict[str, Callable[[str], int]], tmp_path: Path) -> None:
    """1,250 of each kind: the line is named, or every row is there."""
    draw, path, refused = random.Random(kind), tmp_path / "data.jsonl", 0
    for _ in range(1250):
        rows = [json.dumps(row).encode() for row in GOOD[kind]]
        place = draw.randrange(len(rows))
        rows[place] = mutated(GOOD[kind][place], draw)
        path.write_bytes(b"\n".join(rows) + b"\n")
        count, refusal = outcome(lambda: readers[kind](str(path)))
        if refusal is None:
            assert count == len(rows) - (not rows[place].strip())
        else:
            refused += 1
            assert f"{place + 1}" in refusal, (rows[place], refusal)
            assert "\n" not in refusal
    assert 200 < refused < 1250


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "latin-1": (b'{"prompt": "caf\xe9"}\n', "data.jsonl:1: not UTF-8 text"),
    "a broken line": (b'{"prompt": "w1"}\n' * 6 + b'{"prompt": \n', "data.jsonl:7: not JSON"),
    "a number of 5,000 digits": (b'{"prompt": "w1", "n": ' + b"9" * 5000 + b"}\n", "data.jsonl:1: not JSON"),
    "a key twice": (b'{"prompt": "w1", "prompt": "w2"}\n', "data.jsonl:1: not JSON: the key 'prompt' occurs twice"),
    "empty": (b"", "has no rows"),
    "nothing but white space": (b"\n \r\n", "has no rows"),
    "deep": (b'{"prompt": ' + b"[" * 100_000 + b"\n", "data.jsonl:1: not JSON"),
    "a list": (b'["w1"]\n', "data.jsonl:1: expected an object, got a list"),
    "an array over lines": (b'[\n{"prompt": "w1"}\n]\n', "data.jsonl:1: not JSON"),
    "the wrong column": (b'{"promt": "w1"}\n', "did you mean 'promt'"),
}


@pytest.mark.parametrize("name", list(BAD_FILES))
def test_f17_files(name: str, readers: dict[str, Callable[[str], int]], tmp_path: Path) -> None:
    content, expected = BAD_FILES[name]
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(DataError) as caught:
        readers["prompts"](str(tmp_path / "data.jsonl"))
    assert expected in str(caught.value)


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_f17_a_byte_order_mark_and_windows_lines_are_read(
    start: bytes, end: bytes, readers: dict[str, Callable[[str], int]], tmp_path: Path
) -> None:
    lines = [json.dumps(row).encode() for row in GOOD["prompts"]]
    (tmp_path / "data.jsonl").write_bytes(start + end.join(lines))
    assert readers["prompts"](str(tmp_path / "data.jsonl")) == 5


@pytest.mark.parametrize("name", ["data.csv", "data.txt", "data.pkl", "data.jsonl.gz", "data"])
def test_f17_other_kinds_of_file_are_refused_before_they_are_read(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x1f\x8b\x08 truncated")
    with pytest.raises(DataError, match=r"neither \.jsonl nor \.parquet"):
        read_rows(str(tmp_path / name))


@pytest.mark.skipif(sys.platform == "win32", reason="kinds of file")
@pytest.mark.parametrize("kind", ["fifo", "device", "socket", "a link to a device"])
@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.parquet", "data"])
def test_f17_what_could_block_or_never_end_is_not_opened(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_special(kind, tmp_path / name, monkeypatch)
    with pytest.raises(DataError, match=r"not a regular file|No such device|neither \.jsonl"):
        read_rows(str(tmp_path / name))


@pytest.mark.skipif(sys.platform == "win32", reason="kinds of file")
@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_f17_nor_as_settings_or_a_gate(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_special(kind, tmp_path / "run.yaml", monkeypatch)
    for read in (lambda: read_yaml(tmp_path / "run.yaml"), lambda: read_gate(str(tmp_path / "run.yaml"))):
        with pytest.raises(ConfigError):
            read()


def make_special(kind: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        monkeypatch.chdir(path.parent)  # a short name
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path.with_name("between"))
        path.with_name("between").symlink_to("/dev/zero")


def test_f17_a_file_that_unpacks_to_far_more_is_refused_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row is the same long text, which the file holds once."""
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "trap.parquet"
    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 100_000, pyarrow.int32()), ["a" * 100_000])
    parquet.write_table(pyarrow.table({"prompt": texts}), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 1000
    monkeypatch.setattr(rows, "UNPACKED", 10**7)
    with pytest.raises(DataError, match=r"trap\.parquet: the rows unpack to more than 0\.0 GB"):
        read_rows(str(path))


def test_f17_a_file_that_the_memory_does_not_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "w1"}\n' * 1000)
    monkeypatch.setattr(files, "machine_memory", lambda: 10_000.0)
    with pytest.raises(DataError, match="do not fit into memory"):
        read_rows(str(path))


def test_f17_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").mkdir()
    with pytest.raises(DataError, match="Is a directory"):
        read_rows(str(tmp_path / "data.jsonl"))


LONG = "w1 " * 100
BAD_PROMPTS = ["", " \n ", None, 7, [], {"role": "user", "content": "w1"}, [{"role": "user"}]]


@pytest.mark.parametrize("prompt", BAD_PROMPTS)
def test_f16_a_prompt_that_says_nothing(prompt: Any, readers: dict[str, Callable[[str], int]], tmp_path: Path) -> None:
    rows = [{"prompt": "w1"}, {"prompt": prompt}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"data\.jsonl:2: "):
        readers["prompts"](str(tmp_path / "data.jsonl"))


def test_f16_long_prompts_are_counted_and_named(tiny_policy: Path, tmp_path: Path) -> None:
    rows = [{"prompt": LONG if i % 2 else "w1"} for i in range(14)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"7 prompts have more than 64 tokens \(lines 2, 4, 6, 8, 10, \.\.\.\)"):
        load_prompts(str(tmp_path / "data.jsonl"), load_tokenizer(str(tiny_policy)), max_tokens=64)


CONFIGS = {
    "train": TrainConfig,
    "sft": SftConfig,
    "reward": RewardConfig,
    "dpo": DpoConfig,
    "evaluate": EvaluateConfig,
    "sample": SampleConfig,
}


def recipe(verb: str) -> dict[str, Any]:
    if verb == "train":
        return settings(Path("model"), Path("run"))
    if verb in ("sft", "reward", "dpo"):
        return {"output": "run", "model": "model", "data": {"path": "data.jsonl"}, "epochs": 1, "optim": {"eps": 1e-8}}
    place = {"policy": "model"} if verb == "evaluate" else {"model": "model"}
    return {**place, "output": "out", "prompts": {"path": "p.jsonl"}, "sampling": {"temperature": 1.0}}


@pytest.mark.slow
@pytest.mark.parametrize("verb", list(CONFIGS))
def test_f17_two_thousand_mutated_settings(verb: str, tmp_path: Path) -> None:
    """400 of each verb: a ConfigError of one line, or settings."""
    draw, path, refused = random.Random(verb), tmp_path / "run.yaml", 0
    for _ in range(400):
        values = recipe(verb)
        section = draw.choice([values, *(value for value in values.values() if isinstance(value, dict))])
        name = draw.choice(list(section))
        kind = draw.randrange(5)
        if kind == 0:
            section[name] = draw.choice([*STRANGE, float("nan"), float("inf"), 10**400, {"a": {"b": 1}}])
        elif kind == 1:
            section[name + "x"] = section.pop(name)
        elif kind == 2:
            section.pop(name)
        text = bytearray(yaml.safe_dump(values).encode())
        if kind >= 3:
            text[draw.randrange(len(text))] = draw.randrange(256)
        path.write_bytes(text)
        _, refusal = outcome(lambda: parse(CONFIGS[verb], read_yaml(path), where=str(path)))
        refused += refusal is not None
        assert "\n" not in str(refusal)
    assert 50 < refused < 400
