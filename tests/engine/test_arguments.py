"""Wrong arguments of `Engine.load` are refused before anything is read, and the message has the remedy."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from agentkit_engine import AsyncEngine, BackendUnavailableError, DeviceUnavailableError, Engine
from agentkit_engine.arguments import check_devices, check_dtype, check_host_cache_bytes
from agentkit_engine.runtime.runner import choose_backend

NO_GPU = torch.cuda.device_count() == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtype": "fp32"}, ValueError, "one of float32, bfloat16, float16, float64, int8 or None, got 'fp32'"),
        ({"dtype": torch.int16}, ValueError, "got 'torch.int16'"),
        ({"dtype": 32}, TypeError, "dtype must be a str"),
        ({"device": "gpu"}, ValueError, 'device must be "cpu", "cuda" or "cuda:N", got \'gpu\''),
        ({"device": "meta"}, ValueError, 'runs on "cpu" and "cuda", got device=\'meta\''),
        ({"device": 0}, TypeError, "device must be a str"),
        ({"device": None}, TypeError, "device must be a str"),
        ({"device": "cuda:7777"}, Exception, "sees"),
        ({"devices": 0}, ValueError, "devices must be at least 1, got 0; leave it out to use one"),
        ({"devices": True}, TypeError, "devices must be a whole number, got True"),
        ({"devices": "2"}, TypeError, "devices must be a whole number, got '2'"),
        ({"devices": 9}, ValueError, "devices=9 is more than the 8 experts of this model.*; use at most 8"),
        ({"kv_cache_bytes": 0}, ValueError, "kv_cache_bytes must be at least 1 byte, got 0"),
        ({"kv_cache_bytes": 1e9}, TypeError, "kv_cache_bytes must be a whole number"),
        ({"host_cache_bytes": 1 << 30}, ValueError, "is for a GPU; .* raise kv_cache_bytes"),
        ({"host_cache_bytes": -1}, ValueError, "host_cache_bytes must be at least 1 byte, got -1"),
        ({"host_cache_bytes": False}, TypeError, "host_cache_bytes must be a whole number"),
        ({"host_cache_bytes": "1GiB"}, TypeError, "host_cache_bytes must be a whole number"),
        ({"cache_bytes": True}, TypeError, "cache_bytes must be a whole number"),
        ({"cache_bytes": -1}, ValueError, "cache_bytes must be at least 1 byte"),
    ],
)
def test_a_wrong_argument_is_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message.replace("(", r"\(")):
        Engine.load("tiny", **arguments)


@pytest.mark.parametrize("model", [None, 7, ["tiny"], b"tiny"])
def test_a_model_is_a_name_or_a_path(model: Any) -> None:
    with pytest.raises(TypeError, match="model must be a name"):
        Engine.load(model)


def test_more_gpus_than_there_are() -> None:
    assert check_devices(2, torch.device("cuda:1"), 3) == 2
    with pytest.raises(DeviceUnavailableError, match="cuda:1 to cuda:3, but torch sees 3 GPUs; use devices=2"):
        check_devices(3, torch.device("cuda:1"), 3)


@pytest.mark.skipif(not NO_GPU, reason="this machine has a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda")])
def test_a_gpu_that_is_not_there(device: str | torch.device) -> None:
    with pytest.raises(DeviceUnavailableError, match=r"sees 0 GPUs; use device=\"cpu\""):
        Engine.load("tiny", device=device)


@pytest.mark.parametrize(
    ("backend", "device", "message"),
    [
        ("cuda", "cpu", 'no backend "cuda"; choose one of auto, reference, cpu, triton'),
        ("cpu", "cuda", 'backend="cpu" needs a CPU'),
        ("triton", "cpu", 'needs a GPU: pass device="cuda".*TRITON_INTERPRET=1'),
    ],
)
def test_backends_that_do_not_run_on_the_device(backend: str, device: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_backend(backend, torch.device(device))


@pytest.mark.parametrize(("backend", "device"), [("triton", "cuda"), ("cpu", "cpu")])
def test_a_backend_without_its_library(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, f"agentkit_kernels.{backend}.backend", None)
    with pytest.raises(BackendUnavailableError, match=r'pip install .*, or use backend="reference"'):
        choose_backend(backend, torch.device(device))
    assert choose_backend("auto", torch.device(device)) == "reference"
    assert f"the {backend} backend cannot be used" in caplog.text


def gpu(monkeypatch: pytest.MonkeyPatch, hip: str | None, **properties: Any) -> None:
    """Let torch see one GPU, which is not there."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**properties))


TURING = {"major": 7, "minor": 5, "name": "Tesla T4"}
MI250 = {"major": 9, "minor": 0, "name": "AMD Instinct MI250X", "gcnArchName": "gfx90a:sramecc+:xnack-"}


@pytest.mark.parametrize(
    ("hip", "properties", "found"),
    [(None, TURING, "Tesla T4 (sm_75)"), ("6.4", MI250, "AMD Instinct MI250X (gfx90a)")],
)
def test_a_gpu_that_the_kernels_do_not_support(
    hip: str | None,
    properties: dict[str, Any],
    found: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gpu(monkeypatch, hip, **properties)
    with pytest.raises(DeviceUnavailableError) as raised:
        Engine.load("tiny", device="cuda", backend="triton")
    assert str(raised.value) == (
        f"backend=\"triton\" needs an NVIDIA GPU of sm_80 or newer, or an AMD GPU of gfx942, and 'cuda' is {found}; "
        'use backend="reference", or device="cpu"'
    )
    assert choose_backend("auto", torch.device("cuda")) == "reference"
    assert f"forwards will be slow: the triton backend cannot be used: {raised.value}" in caplog.text


@pytest.mark.parametrize(
    ("hip", "properties"),
    [
        (None, {"major": 8, "minor": 0}),
        (None, {"major": 9, "minor": 0}),
        (None, {"major": 12, "minor": 0}),
        ("6.4", {"gcnArchName": "gfx942:sramecc+:xnack-"}),
    ],
)
def test_a_gpu_that_the_kernels_support(
    hip: str | None, properties: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(monkeypatch, hip, name="a GPU", **properties)
    for backend in ("auto", "triton"):
        assert choose_backend(backend, torch.device("cuda")) == "triton"


@pytest.mark.parametrize("dtype", ["float16", torch.float64])
def test_a_dtype_that_triton_does_not_compute_in(dtype: str | torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, None, major=9, minor=0, name="a GPU")
    with pytest.raises(ValueError, match=r'float\d+" is not implemented by backend="triton".*use dtype="bfloat16"'):
        Engine.load("tiny", device="cuda", dtype=dtype)


def test_no_host_memory_by_default() -> None:
    for value in (None, 0):
        assert Engine.load("tiny", host_cache_bytes=value).host_cache_bytes == 0
    assert check_host_cache_bytes(1 << 30, torch.device("cuda")) == 1 << 30


def test_dtypes_have_names() -> None:
    assert check_dtype("float32") is check_dtype("torch.float32") is check_dtype(torch.float32) is torch.float32
    assert check_dtype(None) is None
    assert Engine.load("tiny", dtype="float32").decoder.embed.weight.dtype == torch.float32


def test_any_path_will_do(tmp_path: Path) -> None:
    class Somewhere:
        def __fspath__(self) -> str:
            return str(Path(__file__).parents[2] / "engine" / "agentkit_engine" / "tiny")

    assert Engine.load(Somewhere()).name == "tiny"  # type: ignore[arg-type]


@pytest.mark.parametrize("ids", ["hello", b"hello", [1.5], [True], ["1"], [None]])
def test_token_ids_are_whole_numbers(ids: Any) -> None:
    with Engine.load("tiny").session() as session, pytest.raises(TypeError, match="token ids must be whole numbers"):
        session.append(ids)


def test_token_ids_of_other_libraries_are_taken() -> None:
    with Engine.load("tiny").session() as session:
        session.append(torch.tensor([1, 2]))
        session.append(iter([3]))
        assert list(session.token_ids) == [1, 2, 3]
        assert all(type(token_id) is int for token_id in session.token_ids)


def test_a_number_of_forks_is_a_count() -> None:
    with Engine.load("tiny").session() as session:
        session.append([1])
        with pytest.raises(ValueError, match="at least 0, got -1"):
            session.fork(-1)
        with pytest.raises(TypeError, match=r"whole number, got 1\.5"):
            session.fork(1.5)  # type: ignore[arg-type]


def test_an_async_engine_wraps_an_engine() -> None:
    with pytest.raises(TypeError, match=r"takes an Engine, got 'tiny'; load one with Engine\.load"):
        AsyncEngine("tiny")  # type: ignore[arg-type]


@pytest.mark.parametrize("priority", ["high", 1.5, True, None])
def test_a_priority_is_a_whole_number(priority: Any) -> None:
    with pytest.raises(TypeError, match="priority must be a whole number"):
        Engine.load("tiny").session(priority=priority)
