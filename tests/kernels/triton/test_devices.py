"""Triton's kernels on two devices, here interpreted in two processes, give the bits of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.engine.conftest import make_random_decoder, small_config

from agentkit_engine import Engine, ModelSpec
from agentkit_engine.weights.export import export_checkpoint


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_two_devices_have_the_bits_of_one(dtype: str, tmp_path: Path) -> None:
    spec = ModelSpec.from_config(small_config(0, num_hash_layers=0, n_routed_experts=5, num_experts_per_tok=3))
    export_checkpoint(make_random_decoder(spec), tmp_path)
    one, two = (Engine.load(tmp_path, devices=n, backend="triton", dtype=dtype) for n in (1, 2))
    assert torch.equal(two.logits([1, 2, 3]), one.logits([1, 2, 3]))
    two.close()
