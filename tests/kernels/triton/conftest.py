"""Tests of Triton kernels in Triton's interpreter, on a CPU: `make kernels`.

Triton reads TRITON_INTERPRET when it is imported, so these tests need a pytest process of their own. Without that
variable they are skipped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from agentkit_engine.model.decoder import Decoder
from agentkit_engine.spec import ModelSpec
from agentkit_kernels.aot.interpreter import fast_interpreter
from agentkit_kernels.triton.launch import INTERPRET

HERE = Path(__file__).parent
ERRORS = pytest.StashKey[dict[str, float]]()


CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v4", "vocab_size": 48, "hidden_size": 32, "num_hash_layers": 1, "num_attention_heads": 2,
    "head_dim": 24, "qk_rope_head_dim": 8, "q_lora_rank": 16, "o_groups": 2, "o_lora_rank": 128, "sliding_window": 5,
    "index_n_heads": 4, "index_head_dim": 16, "index_topk": 1, "hc_mult": 4, "hc_sinkhorn_iters": 3, "hc_eps": 1e-6,
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "routed_scaling_factor": 1.5, "swiglu_limit": 10.0, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0, "max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 1,
    "rope_scaling": {
        "type": "yarn", "factor": 16.0, "original_max_position_embeddings": 512, "beta_fast": 32.0, "beta_slow": 1.0,
    },
}  # fmt: skip


@pytest.fixture(scope="session")
def small_decoder() -> Callable[..., Decoder]:
    """Return a function that makes a small random decoder of layers with the given compression ratios; `sizes` replace
    those of `CONFIG`."""

    def make(*ratios: int, mtp: bool = False, **sizes: int) -> Decoder:
        layers = {"num_hidden_layers": len(ratios), "compress_ratios": [*ratios, *[0] * mtp], **sizes}
        spec = ModelSpec.from_config({**CONFIG, **layers, "num_nextn_predict_layers": int(mtp)})
        decoder = Decoder(spec).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, tensor in decoder.state_dict().items():
                if name.endswith("tid2eid"):
                    draws = torch.rand(tensor.shape[0], spec.n_routed_experts, generator=generator)
                    tensor.copy_(draws.argsort(-1)[:, : tensor.shape[1]])
                    continue
                noise = torch.randn(tensor.shape, generator=generator)
                if name.endswith(("norm.weight", "scale")):
                    tensor.copy_(1.0 + 0.2 * noise)
                else:
                    tensor.copy_(noise / (tensor.shape[-1] ** 0.5 if tensor.dim() > 1 and "ape" not in name else 1.0))
        return decoder

    return make


@pytest.fixture(scope="session", autouse=True)
def interpreted_fast() -> Generator[None, None, None]:
    with fast_interpreter() if INTERPRET else nullcontext():
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--errors", type=Path, help="write each kernel file's largest relative error to this JSON file")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not INTERPRET:
        for item in items:
            if item.path.is_relative_to(HERE):
                item.add_marker(
                    pytest.mark.skip(reason="runs with TRITON_INTERPRET=1 in the environment: make kernels")
                )


@pytest.fixture(autouse=True)
def nan_filled_memory() -> Generator[None, None, None]:
    """Fill what `torch.empty` allocates with NaN, so that an element that a kernel does not write is noticed."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def measured_errors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Note the error of each result that a test compares with a twin: largest difference over largest value."""
    errors = request.config.stash.setdefault(ERRORS, {})
    file = request.path.stem.removeprefix("test_")
    assert_close = torch.testing.assert_close

    def measured(actual: Any, expected: Any, **options: Any) -> None:
        if isinstance(expected, torch.Tensor) and expected.is_floating_point() and expected.numel():
            difference = (actual.double() - expected.double()).abs().nan_to_num().max()
            scale = expected.double().abs().nan_to_num(posinf=0.0).max().clamp_min(1e-30)
            errors[file] = max(errors.get(file, 0.0), float(difference / scale))
        assert_close(actual, expected, **options)

    monkeypatch.setattr(torch.testing, "assert_close", measured)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if path := session.config.getoption("--errors", default=None):
        path.write_text(json.dumps(session.config.stash.get(ERRORS, {}), indent=1, sort_keys=True) + "\n")
