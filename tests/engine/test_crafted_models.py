"""Crafted model folders and saved sessions: a typed error, soon, and no memory for the sizes they claim."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from agentkit_engine import CheckpointError, Engine, ModelSpec, OutOfMemoryError, SamplingParams, SavedSessionError
from agentkit_engine.model import Decoder
from agentkit_engine.runtime import saved
from agentkit_engine.spec import ConfigError
from agentkit_engine.weights.checkpoint import read_sampling
from agentkit_engine.weights.export import export_checkpoint
from agentkit_engine.weights.safetensors_file import read_header

from .conftest import make_random_decoder, small_config, some_ids

in_place = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
numbers = st.integers() | st.sampled_from([2**31, 2**63, 2**70, -1, 0]) | st.floats()
leaves = st.none() | st.booleans() | numbers | st.text(max_size=5)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return make_random_decoder(ModelSpec.from_config(small_config(0, 4, 128, sliding_window=48, index_topk=8)))


@pytest.fixture(scope="module")
def exported(decoder: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    export_checkpoint(decoder, folder)
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    for path in exported.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


# Safetensors.


def with_header(header: bytes, data: bytes = b"", size: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if size is None else size) + header + data


def entry(shape: object = (1,), offsets: object = (0, 4), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def headers() -> Iterator[bytes]:
    yield b""
    yield b"\0" * 7
    yield with_header(b"{}", size=2**64 - 1)
    yield with_header(b"{}", size=3)
    for text in (b"[" * 100_000, b'{"a":' * 50_000, b'{"a":1,"a":2}', b"[]", b"null", b"\xff", b'{"__metadata__":3}'):
        yield with_header(text)
    yield with_header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},' * 2 + b'"b":1}', bytes(8))
    shapes: list[object] = [[2**62, 4], [2**70], [-1], [True], [1.0], ["1"], [[1]], None, {}, [1] * 9, [2**40] * 8]
    offsets: list[object] = [
        [0, 2**70],
        [4, 0],
        [0],
        [0, 4, 8],
        [-4, 0],
        [False, 4],
        [0.0, 4.0],
        "04",
        {},
        None,
        [1, 5],
    ]
    dtypes: list[object] = ["F64", "", None, 3, ["F32"], "x" * 100_000]
    entries: list[object] = [entry(shape) for shape in shapes]
    entries += [entry((1,), offset) for offset in offsets] + [entry(dtype=dtype) for dtype in dtypes]
    entries += [None, [], "F32", {}, {"dtype": "F32"}, entry() | {"more": 1}]
    for one in entries:
        yield with_header(json.dumps({"a": one}).encode(), bytes(4))
    for overlap in ([0, 4], [2, 6], [8, 12]):
        yield with_header(json.dumps({"a": entry(), "b": entry((1,), overlap)}).encode(), bytes(12))
    yield with_header(json.dumps({"\x1b[31m\ud800": entry((2,))}).encode(), bytes(4))


@pytest.mark.parametrize("content", list(headers()), ids=lambda content: f"{len(content)} bytes")
def test_a_crafted_header_is_a_checkpoint_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    message = str(caught.value).removeprefix(str(path))
    assert len(message) < 600 and message.isprintable()


def test_a_header_that_claims_gigabytes_is_rejected_unread(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 33))
    os.truncate(path, 1 << 34)
    with pytest.raises(CheckpointError, match="with a header of at most 8388608 bytes"):
        read_header(path)


@given(header=st.dictionaries(st.text(max_size=5), values | st.builds(entry, values, values, values), max_size=3))
@in_place
def test_any_header_is_read_or_a_checkpoint_error(tmp_path: Path, header: dict[str, Any]) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(with_header(json.dumps(header).encode(), bytes(4)))
    try:
        read_header(path)
    except CheckpointError as error:
        assert len(str(error)) < 800


@given(content=st.binary(max_size=200))
@in_place
def test_any_bytes_are_a_safetensors_file_or_a_checkpoint_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    try:
        read_header(path)
    except CheckpointError as error:
        assert str(path) in str(error)


# config.json and the files beside it.

BOMBS: list[dict[str, Any]] = [
    {"n_routed_experts": 2**31},
    {"n_routed_experts": 2**14},
    {"num_hidden_layers": 200_000, "compress_ratios": [0] * 200_000},
    {"num_hidden_layers": 1000, "compress_ratios": [0] * 1000},
    {"num_nextn_predict_layers": 2**40},
    {"hidden_size": 2**60},
    {"vocab_size": 2**31},
    {"sliding_window": 2**40},
    {"max_position_embeddings": 2**62},
    {"index_topk": 2**40},
    {"hc_sinkhorn_iters": 2**31},
    {"hc_mult": 2**20},
    {"head_dim": 10**400},
    {"qk_rope_head_dim": 0},
    {"rope_theta": 1.0},
    {"rope_theta": 1e300},
    {"compress_rope_theta": 0.5},
    {"rms_norm_eps": "1e-6"},
    {"rms_norm_eps": 1e300},
    {"hc_eps": 1e300},
    {"routed_scaling_factor": 1e300},
    {"bos_token_id": -1},
    {"eos_token_id": 96},
    {"eos_token_id": 10**400},
    {"num_hash_layers": 2**62},
    {"dspark_x": {"a": [1] * 1000}, "num_hidden_layers": 10**9},
    {f"key{number}": number for number in range(10_000)},
    {"x" * 100_000: 1},
    {"architectures": [[[["x"]]]]},
    {"quantization_config": 3},
]


@pytest.mark.parametrize("change", BOMBS, ids=lambda change: f"{next(iter(change))[:20]}={len(change)}")
def test_a_configuration_that_claims_too_much_is_rejected_soon(change: dict[str, Any], folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError) as caught:
        Engine.load(folder, backend="reference")
    assert len(str(caught.value)) < 6000


@pytest.mark.parametrize(
    "text",
    [
        b"", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b'{"rms_norm_eps": NaN}',
        b'{"rms_norm_eps": 1e999}', b'{"hidden_size": 1, "hidden_size": 2}', b"{" + b" " * (2 << 20) + b"}",
        b'{"hidden_size": ' + b"9" * 10_000 + b"}", b'"' + b"x" * 100_000 + b'"',
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "agentkit.json", "model.safetensors.index.json"]
)
def test_a_file_with_the_wrong_json_is_named(name: str, text: bytes, folder: Path) -> None:
    (folder / name).write_bytes(text)
    with pytest.raises(CheckpointError) as caught:
        Engine.load(folder, backend="reference")
        read_sampling(folder)
    assert name in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_fifo_in_a_model_folder_never_hangs(name: str, folder: Path) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError):
        Engine.load(folder, backend="reference")


@given(key=st.sampled_from(sorted(small_config(0))), value=values)
@example("rope_scaling", {"type": "yarn"})
@in_place
def test_any_value_of_a_configuration_is_read_or_a_config_error(key: str, value: Any) -> None:
    try:
        ModelSpec.from_config({**small_config(0, 4), key: value})
    except ConfigError as error:
        assert len(str(error)) < 2000


@given(config=st.dictionaries(st.sampled_from(["temperature", "top_p", "top_k", "min_p", "do_sample"]), values))
@example({"top_k": 10**400})
@example({"temperature": 10**400})
@in_place
def test_any_generation_config_is_read_or_a_checkpoint_error(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    try:
        read_sampling(tmp_path)
    except CheckpointError as error:
        assert len(str(error).replace(str(tmp_path), "")) < 2000


INDEXES: list[object] = [
    {},
    {"weight_map": []},
    {"weight_map": {"a": 3}},
    {"weight_map": {"a": None}},
    {"weight_map": {"\ud800": []}},
    {"weight_map": {}, "more": 1},
    *({"weight_map": {"norm.weight": name}} for name in (
        "", ".", "..", "../model.safetensors", "/etc/passwd", "a/b", "a\0b", "\ud800", "a" * 5000, "\x1b[31m",
        "nowhere", "model.safetensors.index.json", "folder", "fifo",
    )),
]  # fmt: skip


@pytest.mark.parametrize("index", INDEXES)
def test_an_index_names_files_of_its_folder_only(index: object, folder: Path) -> None:
    (folder / "folder").mkdir()
    os.mkfifo(folder / "fifo")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        Engine.load(folder, backend="reference")
    message = str(caught.value).removeprefix(str(folder))
    assert len(message) < 600 and message.isprintable()


# Saved sessions.


def open_engine(decoder: Decoder, **options: Any) -> Engine:
    return Engine(
        decoder, name="small", dialect="v4-preview", folder=Path("none"), **({"backend": "reference"} | options)
    )  # fmt: skip


@pytest.fixture
def engine(decoder: Decoder) -> Engine:
    return open_engine(decoder)


@pytest.fixture
def session(engine: Engine, tmp_path: Path) -> Path:
    path = tmp_path / "session"
    with engine.session() as running:
        running.append(some_ids(300, 0))
        next(running.generate(SamplingParams(temperature=0)))
        running.save(path)
    return path


def test_only_the_user_can_read_a_saved_session(session: Path) -> None:
    assert session.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in session.parent.iterdir()] == ["session"]


def test_saving_does_not_follow_another_users_link(engine: Engine, tmp_path: Path) -> None:
    """The temporary name of a file used to be predictable."""
    target = tmp_path / "target"
    for name in (f".session.{os.getpid()}", "session"):
        (tmp_path / name).symlink_to(target)
    with engine.session() as running:
        running.append([1, 2])
        running.save(tmp_path / "session")
    assert not target.exists() and not (tmp_path / "session").is_symlink()


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], Any]) -> None:
    """Change a saved session and give it a valid checksum again."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    change(tensors, metadata)
    metadata.pop("checksum", None)
    metadata["checksum"] = saved._checksum(metadata, tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)


Change = Callable[[dict[str, torch.Tensor], dict[str, str]], Any]
CHANGES: dict[str, Change] = {
    "a tensor is missing": lambda t, m: t.pop("tail.0"),
    "ids are missing": lambda t, m: t.pop("ids"),
    "another tensor": lambda t, m: t.update(more=torch.zeros(1)),
    "narrower": lambda t, m: t.update({"tail.0": t["tail.0"][:, :1]}),
    "fewer spans": lambda t, m: t.update({"entries.0": t["entries.0"][:1]}),
    "another dtype": lambda t, m: t.update({"tail.0": t["tail.0"].half()}),
    "ids of another dtype": lambda t, m: t.update(ids=t["ids"].long()),
    "ids in rows": lambda t, m: t.update(ids=t["ids"].view(1, -1)),
    "a scalar of ids": lambda t, m: t.update(ids=torch.tensor(1, dtype=torch.int32)),
    "a negative id": lambda t, m: t["ids"][0].fill_(-1),
    "an id beyond the vocabulary": lambda t, m: t["ids"][0].fill_(96),
    "fed is shorter": lambda t, m: t.update(fed=t["fed"][:-1]),
    "fed is 7": lambda t, m: t["fed"][0].fill_(7),
    "length beyond the ids": lambda t, m: m.update(length="302", written="302"),
    "length beyond what was written": lambda t, m: m.update(written="299"),
    "length is negative": lambda t, m: m.update(length="-1"),
    "length is a word": lambda t, m: m.update(length="many"),
    "length is superscript": lambda t, m: m.update(length="³"),
    "length is huge": lambda t, m: m.update(length="9" * 5000),
    "no length": lambda t, m: m.pop("length"),
    "written beyond the context": lambda t, m: m.update(written="99999"),
    "state without a length": lambda t, m: m.update(length="0", written="0"),
    "written without a length": lambda t, m: m.update(length="0"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_session_with_a_valid_checksum_that_does_not_fit_is_refused(name: str, engine: Engine, session: Path) -> None:
    rewrite(session, CHANGES[name])
    with pytest.raises(SavedSessionError) as caught:
        engine.open(session)
    assert str(session) in str(caught.value) and len(str(caught.value)) < 600


def test_a_rewritten_session_without_changes_is_accepted(engine: Engine, session: Path) -> None:
    rewrite(session, lambda tensors, metadata: None)
    assert len(engine.open(session)) == 301


def test_a_session_larger_than_all_memory_is_not_read(decoder: Decoder, session: Path) -> None:
    small = open_engine(decoder, kv_cache_bytes=1)
    with pytest.raises(OutOfMemoryError, match="needs 2 spans, but only 1 exist; raise `kv_cache_bytes`"):
        small.open(session)


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_a_session_that_is_not_a_regular_file_is_rejected(
    make: Callable[[Path], Any], engine: Engine, tmp_path: Path
) -> None:
    make(tmp_path / "odd")
    with pytest.raises(SavedSessionError, match="not a regular file"):
        engine.open(tmp_path / "odd")


@given(content=st.binary(max_size=300), cut=st.integers(0, 1 << 20), flip=st.integers(0, 255))
@in_place
def test_any_bytes_are_a_session_or_a_saved_session_error(
    engine: Engine, session: Path, content: bytes, cut: int, flip: int
) -> None:
    whole = session.read_bytes()
    at = cut % len(whole)
    other = session.with_name("other")
    for data in (content, whole[:at], whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :]):
        other.write_bytes(data)
        try:
            assert len(engine.open(other)) == 301 and data == whole
        except SavedSessionError as error:
            assert str(other) in str(error)


def test_a_session_saved_with_other_arithmetic_is_refused(decoder: Decoder, tmp_path: Path) -> None:
    engines = [open_engine(decoder, exact=exact, backend=on) for exact in (True, False) for on in ("cpu", "reference")]
    for writer in engines:
        with writer.session() as running:
            running.append([1, 2, 3])
            running.save(tmp_path / "session")
        assert writer.open(tmp_path / "session").token_ids == (1, 2, 3)
        for reader in engines:
            if reader is not writer:
                with pytest.raises(SavedSessionError, match="model is"):
                    reader.open(tmp_path / "session")
