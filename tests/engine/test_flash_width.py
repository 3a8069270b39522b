"""DeepSeek-V4-Flash at its true width on this CPU: a CSA and an HCA layer of random FP8 and FP4 weights.

With 16 experts the checkpoint takes 2.9 GB on disk and in memory, and the oracle 9 GB. With all 256 it takes 9 GB on
disk; engine and oracle read experts when they need them, so that memory holds few of them.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
from transformers.initialization import no_init_weights
from transformers.models.deepseek_v4 import modeling_deepseek_v4

from agentkit_engine import Engine
from agentkit_engine.benchmarks.random_checkpoint import flash, write_random_checkpoint
from agentkit_engine.sampling_params import SamplingParams
from agentkit_engine.weights.checkpoint import Layout, read_layout
from agentkit_kernels.cpu import Cpu

from .test_parity import oracle_config, oracle_name

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SPEC = flash(4, 128, n_routed_experts=16)
IDS = torch.randint(SPEC.vocab_size, (290,), generator=torch.Generator().manual_seed(2)).tolist()
"""Long enough for the window to move, and for two entries of the HCA layer."""
TOLERANCE = 2e-4
"""Logits are up to 6; sums of 4096 float32 terms in another order differ by 2e-5."""
GREEDY = SamplingParams(temperature=0, max_tokens=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("flash")
    write_random_checkpoint(path, SPEC)
    return path


@pytest.fixture(scope="module")
def engine(folder: Path) -> Generator[Engine]:
    engine = Engine.load(folder, kv_cache_bytes=1 << 28)
    yield engine
    del engine.scheduler


def test_a_live_a_forked_and_a_restored_session_give_the_same_bits(engine: Engine, tmp_path: Path) -> None:
    with engine.session() as live:
        live.append(IDS[:130])
        list(live.generate(GREEDY))
        live.save(tmp_path / "session")
        [forked] = live.fork(1)
        with forked, engine.open(tmp_path / "session") as restored, engine.session() as again:
            again.append(live.token_ids)
            found = [list(session.generate(GREEDY)) for session in (live, forked, restored, again)]
    assert len(found[0]) == GREEDY.max_tokens
    assert found[1:] == found[:1] * 3


def test_chunks_give_the_bits_of_one_prompt_and_the_logits_of_transformers(engine: Engine, folder: Path) -> None:
    logits = engine.logits(IDS)
    assert torch.equal(engine.scheduler.logits(IDS[:140], chunk=129), logits[:140])
    expected = _oracle_logits(folder)
    difference = float((logits - expected).abs().max())
    print(f"max abs difference {difference:.1e}, logits up to {float(expected.abs().max()):.1f}")
    assert difference <= TOLERANCE
    assert float(expected.std()) > 0.1


def test_all_256_experts_give_the_logits_of_dequantised_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_random_checkpoint(tmp_path, flash(4, 128, n_routed_experts=256))
    engine = Engine.load(tmp_path, kv_cache_bytes=1 << 28, expert_cache_bytes=1 << 30)
    logits = engine.logits(IDS)
    ops = engine.scheduler.runner.forward.ops
    assert isinstance(ops, Cpu) and ops.expert_store is not None
    used = len(ops.expert_store.read_experts) // 2  # an expert has two stacks: w1 beside w3, and w2
    del engine, ops
    monkeypatch.setattr(modeling_deepseek_v4, "DeepseekV4Experts", ExpertsOnDisk)
    expected = _oracle_logits(tmp_path)
    difference = float((logits - expected).abs().max())
    print(f"{used} experts, max abs difference {difference:.1e}, logits up to {float(expected.abs().max()):.1f}")
    assert used >= 450  # of 512; the routers' random biases leave some out
    assert difference <= TOLERANCE
    assert float(expected.std()) > 0.1


class ExpertsOnDisk(nn.Module):
    """transformers' experts in plain torch, dequantised one at a time from a checkpoint."""

    layout: Layout
    prefix: str

    def __init__(self, config: DeepseekV4Config) -> None:
        super().__init__()
        self.limit = config.swiglu_limit

    def forward(self, x_ND: Tensor, experts_NA: Tensor, weights_NA: Tensor) -> Tensor:
        out_ND = torch.zeros_like(x_ND)
        for expert in sorted(set(experts_NA.flatten().tolist())):
            w1, w2, w3 = (self.layout.values(f"{self.prefix}.{expert}.w{n}.weight") for n in (1, 2, 3))
            rows, places = torch.where(experts_NA == expert)
            gate, up = (x_ND[rows] @ w.T for w in (w1, w3))
            hidden = F.silu(gate.clamp(max=self.limit)) * up.clamp(-self.limit, self.limit)
            out_ND.index_add_(0, rows, hidden @ w2.T * weights_NA[rows, places, None])
        return out_ND


@torch.inference_mode()
def _oracle_logits(folder: Path) -> Tensor:
    """Return the logits of transformers' model in float32, into which the weights are dequantised one at a time."""
    layout = read_layout(folder)
    with no_init_weights():
        oracle = DeepseekV4ForCausalLM(oracle_config(layout.spec))
    oracle.train(False)
    on_disk = [layer.mlp.experts for layer in oracle.model.layers if isinstance(layer.mlp.experts, ExpertsOnDisk)]
    for index, experts in enumerate(on_disk):
        experts.layout, experts.prefix = layout, f"layers.{index}.ffn.experts"
    state = oracle.state_dict()
    width, filled = layout.spec.moe_intermediate_size, dict.fromkeys(state, 0)
    for name, tensor in layout.expected.items():
        if tensor.expert is not None and on_disk:
            continue
        own = oracle_name(tensor.parameter)
        if tensor.expert is None:
            target = state[own]
        elif own.endswith("w2"):
            own = own.removesuffix("w2") + "down_proj"
            target = state[own][tensor.expert]
        else:
            first = width if own.endswith("w3") else 0
            own = own[:-2] + "gate_up_proj"
            target = state[own][tensor.expert, first : first + width]
        target.copy_(layout.values(name))
        filled[own] += target.numel()
    assert filled == {name: tensor.numel() for name, tensor in state.items()}
    logits: Tensor = oracle(torch.tensor([IDS]), use_cache=False).logits
    return logits[0]
