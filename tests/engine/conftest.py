"""Small random models for the engine's tests."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch

from agentkit_engine.benchmarks import random_checkpoint
from agentkit_engine.model import Decoder
from agentkit_engine.sampler import Draw, SampledToken, sample
from agentkit_engine.sampling_params import SamplingParams

make_random_decoder, randomize_ = random_checkpoint.random_decoder, random_checkpoint.randomize_


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Generator[None, None, None]:
    """One torch thread: with tiny products, threads wait for each other longer than they compute, above all on a
    busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def two_threads() -> Generator[None, None, None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


SMALL_CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hash_layers": 1,
    "num_attention_heads": 4,
    "head_dim": 32,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 32,
    "o_groups": 2,
    "o_lora_rank": 16,
    "sliding_window": 128,
    "index_n_heads": 16,
    "index_head_dim": 32,
    "index_topk": 8,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 512,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    },
    "max_position_embeddings": 8192,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def small_config(*ratios: int, mtp: bool = False, **overrides: Any) -> dict[str, Any]:
    """Return an official-keys config of a small model whose layers have the given compress ratios."""
    return {
        **SMALL_CONFIG,
        "num_hidden_layers": len(ratios),
        "num_nextn_predict_layers": int(mtp),
        "compress_ratios": [*ratios, 0] if mtp else list(ratios),
        **overrides,
    }


def some_ids(count: int, seed: int = 1) -> list[int]:
    """Return random ids of `small_config`'s vocabulary."""
    ids: list[int] = torch.randint(0, 96, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids


def sample_one(logits_V: torch.Tensor, params: SamplingParams, **draw: Any) -> SampledToken:
    """Sample from a single row, and raise its error; `draw` has the other fields of `Draw`."""
    [token] = sample(logits_V[None], [Draw(params, **draw)])
    if isinstance(token, Exception):
        raise token
    return token


@pytest.fixture
def make_config() -> Callable[..., dict[str, Any]]:
    return small_config


@pytest.fixture
def random_decoder() -> Callable[..., Decoder]:
    return make_random_decoder
