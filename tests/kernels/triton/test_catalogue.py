"""All launches of an engine are in the catalogue of `python -m agentkit_kernels.aot`, whatever their number formats.

A configuration is a kernel with the dtypes of its tensors and its choices, without sizes. Nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import agentkit_kernels.triton
from agentkit_engine.runtime.runner import Runner
from agentkit_engine.runtime.scheduled import ScheduledTokens
from agentkit_engine.runtime.state import KVCacheDtype, Pools
from agentkit_engine.weights.checkpoint import load_checkpoint
from agentkit_engine.weights.export import export_checkpoint
from agentkit_kernels.aot import calls as catalog
from agentkit_kernels.calls import TINY

CPU = torch.device("cpu")


class Configuration(NamedTuple):
    kernel: str
    dtypes: tuple[torch.dtype | None, ...]
    choices: frozenset[tuple[str, bool | str]]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[Configuration]:
    """Note launches in place of making them."""
    found = set[Configuration]()

    def note(kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
        dtypes = tuple(arg.dtype if arg is not None else None for arg in args if arg is None or isinstance(arg, Tensor))
        choices = frozenset((name, value) for name, value in options.items() if isinstance(value, (bool, str)))
        found.add(Configuration(kernel.__name__, dtypes, choices))

    for module in iter_modules(agentkit_kernels.triton.__path__, "agentkit_kernels.triton."):
        monkeypatch.setattr(import_module(module.name), "launch", note, raising=False)
    return found


def listed(found: set[Configuration]) -> set[Configuration]:
    """Return the configurations in the catalogue; `found` notes what is launched."""
    found.clear()
    for file in catalog.kernel_files():
        for call in catalog.calls(file, TINY, catalog.ROWS, catalog.OnMeta()):
            call.run()
    return found.copy()


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("format", ["bf16", "official", "int8", "official, quantised activations"])
def test_what_an_engine_launches_is_compiled(
    launched: set[Configuration],
    small_decoder: Callable[..., Any],
    tmp_path: Path,
    format: str,
    dtype: torch.dtype,
    kv_cache_dtype: KVCacheDtype,
) -> None:
    name, _, quantised = format.partition(", ")
    decoder = small_decoder(0, 4, 128, mtp=True, head_dim=72, index_head_dim=32)
    export_checkpoint(decoder, tmp_path, format=name)  # type: ignore[arg-type]
    decoder, _ = load_checkpoint(tmp_path, device=CPU, dtype=dtype, packed=True)
    assert decoder.embed.weight.dtype == dtype
    pools = Pools(decoder.spec, slots=1, spans=1, device=CPU, kv_cache_dtype=kv_cache_dtype)
    runner = Runner(decoder, pools, backend="triton", quantize_activations=bool(quantised))
    sequence = pools.open()
    pools.reserve(sequence, 131)
    for ids in ([2] * 130, [2]):  # enough rows for prefill, and then decoding
        runner.step([ScheduledTokens(sequence, ids)])
    runner.mtp_draft(torch.zeros(1, 4, 32, dtype=dtype), [2])
    of_engine = launched.copy()
    assert {"_attend_kernel", "_compress", "_linear", "_down", "_index_scan", "_index_stream"} <= {
        one.kernel for one in of_engine
    }
    assert not of_engine - listed(launched)
