"""Crafted trajectories and task files from untrusted sources give a value or a typed error with its place, quickly."""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.testing
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from agentkit import (
    Header,
    SamplingParams,
    TokenSegment,
    Trajectory,
    TrajectoryError,
    TrajectoryFormatError,
    TrajectoryWriteError,
)
from agentkit.cli import app
from agentkit.errors import TaskFileError
from agentkit.task import MAX_YAML_NODES, Task, load_task

in_place = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
SOON_S = 20.0
"""Far above the time of any file here on a quiet machine (a second), and far below that of a successful attack."""


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


def make_folder(path: Path) -> None:
    path.mkdir()


def make_huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


ODD = [make_fifo, make_device, make_loop, make_folder, make_huge]


# Trajectories.


def line(seq: int, record: bytes, time_s: bytes = b"0.5") -> bytes:
    body = b'{"seq":%d,"time_s":%b,"record":%b' % (seq, time_s, record)
    return body + b',"crc32":"%08x"}\n' % zlib.crc32(body)


@pytest.fixture
def good(tmp_path: Path) -> bytes:
    path = tmp_path / "good.jsonl"
    header = Header("m", "v4-preview", "high", SamplingParams(), (), "auto", metadata={"a": [1]})
    trajectory = Trajectory(header, path)
    trajectory.append(TokenSegment("sampled", (7, 1), (-0.25, -1.5)))
    trajectory.close()
    return path.read_bytes()


SEGMENT = b'{"type":"segment","kind":"prompt","ids":[%b]}'
USER = b'{"type":"message","message":{"role":"user","content":"x"%b}}'
ASSISTANT = b'{"type":"message","message":{"role":"assistant","content":"","calls":[%b]}}'

RECORDS: dict[str, bytes] = {
    "a negative id": SEGMENT % b"1,-1",
    "a huge id": SEGMENT % b"2147483648",
    "an id of 4,000 digits": SEGMENT % (b"9" * 4000),
    "an id of 10,000,000 digits": SEGMENT % (b"9" * 10_000_000),
    "a true id": SEGMENT % b"true",
    "an id in words": SEGMENT % b'"5"',
    "a fractional id": SEGMENT % b"5.0",
    "a million wrong ids": SEGMENT % (b'"x",' * 40_000 + b"1"),
    "a million fractions": SEGMENT % (b"0.5," * 1_000_000 + b"1"),
    "a million lists": SEGMENT % (b"[]," * 1_000_000 + b"1"),
    "more numbers than a context has": SEGMENT % (b"7," * 2_600_000 + b"7"),
    "deep ids": SEGMENT % (b"[" * 1_000_000),
    "too few logprobs": b'{"type":"segment","kind":"sampled","ids":[1,2],"logprobs":[-0.5]}',
    "a logprob that is no number": b'{"type":"segment","kind":"sampled","ids":[1],"logprobs":[NaN]}',
    "an infinite logprob": b'{"type":"segment","kind":"sampled","ids":[1],"logprobs":[-Infinity]}',
    "a logprob out of range": b'{"type":"segment","kind":"sampled","ids":[1],"logprobs":[-1e999]}',
    "many unknown keys": USER % b"".join(b',"k%d":1' % number for number in range(24_000)),
    "more strings than a record has": USER % b"".join(b',"k%d":1' % number for number in range(60_000)),
    "a million wrong calls": ASSISTANT % (b"1," * 1_000_000 + b"1"),
    "deep arguments": ASSISTANT % b'{"id":"a","name":"b","arguments":%b}' % (b"[" * 500_000),
    "an unknown record": b'{"type":"nope"}',
    "no type": b"{}",
    "a list": b"[]",
    "null": b"null",
    "nothing": b"",
    "a lone surrogate": USER % b',"x":"\\ud800"',
    "bytes that are no text": USER % b',"x":"\xff"',
    "a second header": b'{"type":"header"}',
}


@pytest.mark.parametrize("name", RECORDS)
def test_an_invalid_record_with_a_valid_checksum_is_an_error_with_its_line(
    name: str, good: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "crafted.jsonl"
    path.write_bytes(good + line(2, RECORDS[name]))
    begun = time.monotonic()
    with pytest.raises(TrajectoryFormatError, match=r"crafted\.jsonl, line 3") as caught:
        Trajectory.load(path)
    assert time.monotonic() - begun < SOON_S
    assert len(str(caught.value)) < 1500 and str(caught.value).isprintable()


@pytest.mark.parametrize("time_s", [b"NaN", b"Infinity", b"-1", b"1e300", b'"1"', b"true", b"null"])
def test_an_invalid_time_is_an_error_with_its_line(time_s: bytes, good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "crafted.jsonl"
    path.write_bytes(good + line(2, SEGMENT % b"1", time_s))
    with pytest.raises(TrajectoryFormatError, match="line 3 is intact but not a valid"):
        Trajectory.load(path)


@pytest.mark.parametrize("value", [b"NaN", b"[Infinity]", b'{"x":-Infinity}'])
def test_metadata_holds_finite_numbers_only(value: bytes, good: bytes, tmp_path: Path) -> None:
    header = json.loads(good.splitlines()[0])["record"] | {"metadata": {"a": "@"}}
    path = tmp_path / "crafted.jsonl"
    path.write_bytes(line(0, json.dumps(header).encode().replace(b'"@"', value)))
    with pytest.raises(TrajectoryFormatError, match="is not a JSON number"):
        Trajectory.load(path)
    header["metadata"] = {"a": "NaN and Infinity, in words"}
    path.write_bytes(line(0, json.dumps(header).encode()))
    assert Trajectory.load(path).header.metadata == header["metadata"]


@pytest.mark.parametrize("tool", [{}, {"function": 1}, {"function": {"name": 1}}, {"function": {"parameters": {}}}])
def test_a_tool_without_a_name_is_an_error(tool: dict[str, Any], good: bytes, tmp_path: Path) -> None:
    header = json.loads(good.splitlines()[0])["record"] | {"tools": [tool]}
    path = tmp_path / "crafted.jsonl"
    path.write_bytes(line(0, json.dumps(header).encode()))
    with pytest.raises(TrajectoryFormatError, match=r"crafted\.jsonl, line 1 .* expected a tool as an OpenAI dict"):
        Trajectory.load(path)


def test_a_version_of_another_type_is_named(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "crafted.jsonl"
    path.write_bytes(line(0, b'{"type":"header","version":%b}' % (b"[" * 150 + b"]" * 150)))
    with pytest.raises(TrajectoryFormatError, match=r"version \[\[\[\[...\]\]\]\]; this agentkit reads version 3"):
        Trajectory.load(path)


def test_a_line_or_file_above_the_size_limit_is_refused(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "crafted.jsonl"
    path.write_bytes(good)
    os.truncate(path, 40 << 20)
    with pytest.raises(TrajectoryFormatError, match="line 3 has more than 33,554,432 bytes"):
        Trajectory.load(path)
    os.truncate(path, 1 << 40)
    with pytest.raises(TrajectoryFormatError, match="has 1,099,511,627,776 bytes, expected at most"):
        Trajectory.load(path)


@pytest.mark.parametrize("make", [make_fifo, make_device, make_loop, make_folder])
def test_a_trajectory_that_is_not_a_regular_file_never_hangs(
    make: Callable[[Path], None], good: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "good.jsonl"
    trajectory = Trajectory.load(path)
    path.unlink()
    make(path)
    with pytest.raises(TrajectoryError, match="Cannot read trajectory"):
        Trajectory.load(path)
    with pytest.raises(TrajectoryWriteError, match="Cannot write trajectory"):
        trajectory.reopen()


@given(content=st.binary(max_size=300), record=st.binary(max_size=100), place=st.integers(0, 1 << 20))
@in_place
def test_any_bytes_are_a_trajectory_or_a_trajectory_error(
    good: bytes, tmp_path: Path, content: bytes, record: bytes, place: int
) -> None:
    path = tmp_path / "any.jsonl"
    at = place % len(good)
    for data in (content, good[:at] + content + good[at:], good + line(2, record), line(0, record)):
        path.write_bytes(data)
        try:
            Trajectory.load(path)
        except TrajectoryError as error:
            assert str(path) in str(error) and len(str(error)) < 1500


# Task files.

HEAD = "id: a\ninstruction: x\n"

FILES: dict[str, tuple[str | bytes, str]] = {
    "an invalid bool": (HEAD + "system: !!bool x", ":3: not valid YAML: 'x' is not a valid bool"),
    "an invalid integer": (HEAD + "metadata: {a: !!int x}", ":3: not valid YAML: 'x' is not a valid int"),
    "an invalid number": (HEAD + "metadata: {a: !!float x}", ":3: not valid YAML: 'x' is not a valid float"),
    "an invalid time": (HEAD + "metadata: {a: !!timestamp x}", ":3: .*!!timestamp is not a JSON value"),
    "bytes": (HEAD + "metadata: {a: !!binary aGk=}", ":3: .*!!binary is not a JSON value"),
    "a set": (HEAD + "metadata: {a: !!set {b}}", ":3: .*!!set is not a JSON value"),
    "a list tagged as a mapping": (HEAD + "metadata: !!map [1, 2]", ":3: .*expected a mapping node"),
    "a mapping tagged as a list": (HEAD + "tools: !!seq {b: c}", ":3: .*expected a sequence node"),
    "a Python object": (HEAD + "system: !!python/object/apply:os.getcwd []", ":3: .*could not determine"),
    "an integer of 20,000 bits": (HEAD + f"metadata: {{a: 0x{'f' * 5000}}}", ":3: .*more than 64 bits"),
    "an integer of 5,000 digits": (HEAD + f"metadata: {{a: {'9' * 5000}}}", ":3: .*is not a valid int"),
    "infinity": (HEAD + "agent: {timeout_s: .inf}", ":3: .*.inf is not a finite number"),
    "NaN": (HEAD + "metadata: {a: .nan}", ":3: .*.nan is not a finite number"),
    "a year of seconds": (HEAD + "agent: {timeout_s: 31536000.0}", ":3: agent.timeout_s: input should be less"),
    "a true count": (HEAD + "agent: {max_turns: true}", ":3: agent.max_turns: .*got bool True"),
    "a zettabyte": (HEAD + "environment: {limits: {memory_mib: 1000000000000000}}", ":3: .*memory_mib: input should"),
    "laughs": (
        HEAD + "metadata:\n  a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)),
        ":[678]: .*more than 10000 values, including those repeated by aliases",
    ),
    "merges": (
        HEAD + f"metadata:\n  a: &a {{{', '.join(f'k{i}: 1' for i in range(200))}}}\n"
        + f"  b: {{<<: [{', '.join(['*a'] * 500)}]}}",
        ":5: .*more than 10000 values",
    ),
    "a merge of a number": (HEAD + "metadata: {<<: 5}", ":3: .*for merging"),
    "a cycle": (HEAD + "metadata: &m {a: *m}", r":3: .*\*m is inside its own anchor"),
    "a cycle in a list": (HEAD + "metadata: {a: &m [1, [*m]]}", r":3: .*\*m is inside"),
    "a cycle in a key": ("&r {*r : 1}", r":1: .*\*r is inside"),
    "a cyclic schema": (
        HEAD + "tools:\n- {name: x, description: y, command: z, parameters: &p {type: object, properties: {a: *p}}}",
        r":4: .*\*p is inside",
    ),
    "an unknown alias": (HEAD + "system: *nope", ":3: .*undefined alias 'nope'; quote text that starts with *"),
    "depth": (HEAD + f"metadata: {{a: {'[' * 5000}{']' * 5000}}}", ":3: .*nested more than 50 deep"),
    "depth of blocks": ("\n".join(" " * i + "a:" for i in range(900)), ":50: .*nested more than 50 deep"),
    "depth of dashes": ("- " * 50_000, ":1: .*nested more than 50 deep"),
    "braces": ("{" * 50_000, ":1: .*nested more than 50 deep"),
    "values": (HEAD + f"metadata: {{a: [{'1,' * 20_000}]}}", ":3: .*more than 10000 values"),
    "unknown keys": (HEAD + "".join(f"k{i}: 1\n" for i in range(4000)), ":3: unknown key \"k0\""),
    "a NUL": (HEAD + "system: a\0b", ":3: not valid YAML: character 0x00 is not allowed"),
    "a NUL in a command": (HEAD + 'environment: {setup: ["a\\0b"]}', ":3: environment.setup.0: must not contain a NUL"),
    "a NUL in a value": (HEAD + 'environment: {env: {A: "\\0"}}', ":3: environment.env.A: must not contain a NUL"),
    "a NUL in a name": (HEAD + 'environment: {env: {"A\\0": b}}', ":3: .*is not a variable name"),
    "a lone surrogate": (HEAD + 'system: "\\ud800"', ":3: .*lone surrogate"),
    "variables in a list": (HEAD + "environment:\n  env: [A=B]", ":4: environment.env: .*; write one `NAME: value`"),
    "an equals sign in a name": (HEAD + 'environment: {env: {"A=B": c}}', ":3: .*'A=B' is not a variable name"),
    "a number in place of text": (HEAD + "environment: {env: {A: 1}}", ":3: .*got int 1; quote it to make it text"),
    "one command in place of a list": (HEAD + "environment: {setup: make}", ":3: .*; write `- ` before each item"),
    "an unquoted colon": ("id: a\ninstruction: Fix this: now", ':2: .*; quote text that contains ": "'),
    "a tab": ("id: a\n\tinstruction: x", ":2: .*cannot start any token; indent with spaces"),
    "an at sign": ("id: @a", ":1: .*quote text that starts with @"),
    "a star": ("id: *.txt", r":1: .*quote text that starts with \*"),
    "an exclamation mark": ("id: a\ninstruction: !important x", ":2: .*; quote text that starts with !"),
    "a key that is a number": (HEAD + "1: x", ":3: 1: keys should be strings, got int 1"),
    "a key that is a list": (HEAD + "[a]: x", ":3: .*unhashable key"),
    "a duplicate key": (HEAD + '"a\\e[31m": 1\n"a\\e[31m": 2', r':4: .*duplicate key "a\\x1b\[31m"'),
    "two documents": (HEAD + "---\na: 1", ":3: .*expected a single document"),
    "UTF-16": (HEAD.encode("utf-16"), ":1: not UTF-8 text: byte 0 is 0xff"),
    "Latin-1": (HEAD.encode() + b"system: \xe9", ":3: not UTF-8 text: byte 29 is 0xe9"),
    "binary": (bytes(range(256)), ":2: not UTF-8 text: byte 128 is 0x80"),
    "nothing": ("", ":1: expected keys and values .*, got nothing"),
    "a list": ("- a", ":1: expected keys and values"),
    "a long text": ("x" * 400_000, ":1: expected keys and values"),
    "too much text": ("x" * 600_000, ": cannot be read: it has 600,000 bytes, .*include them with `!file`"),
    "a file outside": (HEAD + "system: !file ../secret", ":3: .*lies outside"),
    "an absolute path": (HEAD + "system: !file /etc/passwd", ":3: .*lies outside"),
    "a link outside": (HEAD + "system: !file up", ":3: .*lies outside"),
    "a file without a name": (HEAD + "system: !file", ":3: .*it is a folder"),
    "a file whose name is a mapping": (HEAD + "system: !file {a: b}", ":3: .*expected !file NAME"),
    "a file with a NUL in its name": (HEAD + 'system: !file "a\\0"', ":3: .*cannot be read as text"),
    "a file with a long name": (HEAD + f"system: !file {'a' * 5000}", ":3: .*File name too long"),
    "a file that is not text": (HEAD + "system: !file binary", ":3: .*cannot be read as text"),
    "a link to itself": (HEAD + "system: !file make_loop", ":3: .*cannot be read as text: Symlink loop"),
    "a FIFO": (HEAD + "system: !file make_fifo", ":3: .*it is a FIFO"),
    "a folder": (HEAD + "system: !file make_folder", ":3: .*it is a folder"),
    "a terabyte": (HEAD + "system: !file make_huge", ":3: .*1,099,511,627,776 bytes, expected at most 16,777,216"),
    "files that are too large in total": (
        HEAD + f"metadata: [{', '.join(['!file large'] * 3)}]", ":3: .*6,000,000 bytes, expected at most 4,777,216",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_crafted_task_file_is_an_error_with_its_line(name: str, tmp_path: Path) -> None:
    for make in (make_fifo, make_loop, make_folder, make_huge):
        make(tmp_path / make.__name__)
    (tmp_path / "up").symlink_to("/etc/passwd")
    (tmp_path / "binary").write_bytes(b"\xff\0")
    (tmp_path / "large").write_bytes(b"x" * 6_000_000)
    content, message = FILES[name]
    path = tmp_path / "task.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    begun = time.monotonic()
    with pytest.raises(TaskFileError, match=r"task\.yaml" + message) as caught:
        load_task(path)
    assert time.monotonic() - begun < SOON_S
    told = str(caught.value).replace(str(tmp_path), "")
    assert len(told) < 10_000 and told.replace("\n", "").isprintable()


@pytest.mark.parametrize("make", ODD)
def test_a_task_file_that_is_not_a_regular_file_never_hangs(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "task.yaml")
    with pytest.raises(TaskFileError, match=r"task\.yaml: cannot be read: "):
        load_task(tmp_path / "task.yaml")


def test_unusual_but_valid_yaml_is_read(tmp_path: Path) -> None:
    """Dates are text, a byte order mark is skipped, and anchors may be used within limits."""
    path = tmp_path / "task.yaml"
    path.write_bytes(
        b"\xef\xbb\xbfid: a\r\ninstruction: 2024-02-30\r\nmetadata:\r\n  base: &b {k: 1, at: 2024-02-28}\r\n"
        b"  more: {<<: *b, eq: =}\r\n  again: [*b, *b]\r\n"
    )
    task = load_task(path)
    base = {"k": 1, "at": "2024-02-28"}
    assert task.instruction == "2024-02-30"
    assert task.metadata == {"base": base, "more": base | {"eq": "="}, "again": [base, base]}
    assert json.loads(task.model_dump_json())["metadata"] == task.metadata


def test_the_value_limit_is_exact(tmp_path: Path) -> None:
    path = tmp_path / "task.yaml"
    path.write_text(HEAD + f"metadata: {{a: [{'1,' * (MAX_YAML_NODES - 9)}]}}")
    assert len(load_task(path).metadata["a"]) == MAX_YAML_NODES - 9


pieces = st.sampled_from(
    [*"[]{}:,-?|>&*!%@`'\"#\n \t\\~=.0123456789", ": ", "- ", "\n  ", "&a", "*a", "<<", "!!int ", "!!map ", "!file ",
     "a", "id", "instruction", "metadata", "env", "0x", ".inf", "2024-02-30", "---", "...", "%YAML 9.9",
     "\ufeff", "\\ud800"]
)  # fmt: skip


@given(content=st.binary(max_size=100) | st.lists(pieces, max_size=40).map(lambda parts: "".join(parts).encode()))
@example(HEAD.encode() + b"metadata: {? [a] : b}")
@example(HEAD.encode() + b"metadata: {? {a: b} : c}")
@example(HEAD.encode() + b"metadata: {.nan: 1}")
@example(HEAD.encode() + b"? |\n  x\n: y")
@in_place
def test_any_bytes_are_a_task_or_a_task_file_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "task.yaml"
    for data in (content, HEAD.encode() + b"metadata:\n  " + content, HEAD.encode() + content):
        path.write_bytes(data)
        try:
            task = load_task(path)
        except TaskFileError as error:
            assert str(path) in str(error)
        else:
            assert Task.model_validate_json(task.model_dump_json()) == task


# Output schemas.


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b'{"a": 1, "a": 2}', b"\xff", b'{"minimum": NaN}', b"{" + b" " * (2 << 20) + b"}", b"[]"],
)
def test_a_crafted_output_schema_is_a_usage_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_bytes(content)
    assert_refused(tmp_path / "schema.json")


def test_an_output_schema_that_is_a_fifo_never_hangs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "schema.json")
    assert_refused(tmp_path / "schema.json")


def assert_refused(schema: Path) -> None:
    arguments: list[Any] = ["run", "say hello", "--output-schema", str(schema)]
    result = typer.testing.CliRunner().invoke(app, arguments, env={"COLUMNS": "400"})
    assert result.exit_code == 2 and "schema.json" in result.output, result.output
