"""Files of strangers are read only if they are regular and of a bounded size, and JSON of a bounded shape."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agentkit_engine.untrusted import open_fd, open_regular, parse_json, read_regular, shorten


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))


KINDS: list[tuple[Callable[[Path], Any], str]] = [
    (os.mkfifo, "it is a FIFO"),
    (Path.mkdir, "it is a folder"),
    (lambda path: path.symlink_to("/dev/zero"), "it is a device"),
    (lambda path: path.symlink_to(path.name), "Too many levels"),
    (make_socket, "it is a socket"),
]


@pytest.mark.parametrize(("make", "message"), KINDS)
def test_only_regular_files_are_opened(
    make: Callable[[Path], Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    make(tmp_path / "odd")
    for read in (open_regular, lambda path: read_regular(path, max_bytes=10), lambda path: open_fd(path, os.O_WRONLY)):
        with pytest.raises(OSError, match=message):
            read(tmp_path / "odd")


def test_links_are_followed_unless_told_otherwise(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"text")
    (tmp_path / "link").symlink_to("file")
    assert read_regular(tmp_path / "link", max_bytes=4) == b"text"
    with pytest.raises(OSError, match="it is a symbolic link"):
        open_regular(tmp_path / "link", follow=False)


def test_what_takes_the_place_of_a_file_between_look_and_open_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, opened = tmp_path / "file", os.open
    path.write_bytes(b"text")

    def late(name: Path, *arguments: Any, **options: Any) -> int:
        path.unlink()
        os.mkfifo(path)
        return opened(name, *arguments, **options)

    monkeypatch.setattr(os, "open", late)
    with pytest.raises(OSError, match="it is a FIFO"):
        open_regular(path)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "a" * 5000])
def test_what_is_no_name_is_an_error_of_the_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(OSError):
        read_regular(tmp_path / name, max_bytes=10)


def test_a_file_beyond_its_bound_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(OSError, match=r"it has 1,099,511,627,776 bytes, expected at most 100"):
        read_regular(path, max_bytes=100)
    path.write_bytes(b"x" * 100)
    assert len(read_regular(path, max_bytes=100)) == 100


def test_a_file_longer_than_its_size_says_is_cut_off() -> None:
    """Files of /proc say that they are empty."""
    with pytest.raises(OSError, match="it has more than 10 bytes"):
        read_regular("/proc/self/status", max_bytes=10)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[" + b"0," * 600_000 + b"0]", "more than 500,000 values"),
        (b'{"a": 1, "a": 2}', "key 'a' twice in one object"),
        (b"[NaN]", "NaN is not a JSON number"),
        (b"[-Infinity]", "-Infinity is not a JSON number"),
        (b"[1e999]", "number 1e999 is out of range"),
        (b"[" + b"9" * 5000 + b"]", "limit"),
        (b'"\xff"', "utf-8"),
        (b"", "Expecting value"),
        (b"\xef\xbb\xbf{}", "BOM|Expecting value"),
        (b"{} {}", "Extra data"),
    ],
)
def test_what_json_may_not_be(text: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(value=json_values)
def test_json_is_read_as_it_was_written(value: Any) -> None:
    assert parse_json(json.dumps(value).encode()) == value


@given(
    data=st.binary(max_size=60) | st.text(alphabet='[]{}",:0123456789.eE+-\\ntrufalsNI ', max_size=60).map(str.encode)
)
@example(b"[" * 2000)
def test_any_bytes_are_a_value_or_a_value_error(data: bytes) -> None:
    try:
        parse_json(data)
    except ValueError as error:
        assert len(str(error)) < 500


@given(value=json_values | st.binary() | st.integers(min_value=10**5000))
@example([[[[[[["deep"]]]]]]] * 1000)
@example("\x1b[31m\ud800" * 1000)
def test_what_is_shown_of_a_value_is_short_and_printable(value: Any) -> None:
    for quote in (True, False):
        text = shorten(value, quote=quote)
        assert len(text) < 2500 and text.isprintable()
    if isinstance(value, str):
        assert len(shorten(value)) < 300
