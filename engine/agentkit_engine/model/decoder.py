"""The decoder: embedding, layers over parallel residual streams, output head. Dimension key: `model/__init__.py`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from agentkit_engine.model.forward import Forward
from agentkit_engine.model.parameters import Block, Gate, MTPBlock, RMSNorm
from agentkit_engine.spec import ModelSpec
from agentkit_kernels.ops import Plan
from agentkit_kernels.packed import PackedRows
from agentkit_kernels.reference import Reference
from agentkit_kernels.trace import Trace


class Decoder(nn.Module):
    """DeepSeek-V4: token ids in, logits out.

    Batches hold sequences of equal length (padding on the left would shift the compressors' windows). Build it under
    `torch.device("meta")` and `load_state_dict(..., assign=True)` for weights from a file, or use `initialize_`.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embed = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(Block(spec, layer) for layer in spec.layers)
        self.norm = RMSNorm(spec.hidden_size)
        self.head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        self.hc_head_fn = nn.Parameter(torch.zeros(spec.hc_mult, spec.hc_mult * spec.hidden_size))
        self.hc_head_base = nn.Parameter(torch.zeros(spec.hc_mult))
        self.hc_head_scale = nn.Parameter(torch.ones(1))
        self.mtp = nn.ModuleList(MTPBlock(spec, layer) for layer in spec.mtp_layers)
        self.products = torch.float32
        """Dtype of the factors of most products in `forward`; training may lower it."""
        self.packed: dict[str, PackedRows] = {}
        """Matrices that are no parameters, because they stay packed; by name."""

    def pack(self, matrices: Mapping[str, PackedRows]) -> None:
        """Replace parameters by packed matrices. The decoder then serves; it can no longer be trained or exported."""
        for name, matrix in matrices.items():
            path, _, own = name.rpartition(".")
            module = self.get_submodule(path)
            delattr(module, own)
            setattr(module, own, matrix)
            self.packed[name] = matrix

    @property
    def blocks(self) -> list[Block]:
        """Every decoder block: the main stack in order, then the MTP block if there is one."""
        return [block for block in (*self.layers, *self.mtp) if isinstance(block, Block)]

    def forward(self, token_ids_BT: Tensor, *, trace: Trace | None = None) -> Tensor:
        """Return the logits of the tokens after `token_ids`, float32 [B, T, V], from position 0 on. Differentiable.

        This is the forward that serves sessions, on the reference backend and without state to continue from.

        Args:
            token_ids_BT: T >= 1 tokens of each of B sequences, int64.
            trace: Filled with intermediate results for training.

        Raises:
            ValueError: `token_ids` is not [B, T] with T >= 1.
        """
        if token_ids_BT.dim() != 2 or token_ids_BT.shape[1] == 0:
            raise ValueError(f"token_ids must have shape [B, T] with T >= 1, got {list(token_ids_BT.shape)}")
        computed = self._forward(trace)(_plan(token_ids_BT, trace))
        if trace is not None:
            trace.streams_BTMD = computed.streams.view(*token_ids_BT.shape, *computed.streams.shape[1:])
        return computed.logits.view(*token_ids_BT.shape, -1)

    def draft_logits(
        self, streams_BTMD: Tensor, next_ids_BT: Tensor, *, trace: Trace | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the MTP block at positions i from 0 on: it reads token i+1 and predicts token i+2.

        Args:
            streams_BTMD: The main stack's streams at positions i (`Trace.streams_BTMD`, cut to T), or the streams
                that this method returned, to draft further.
            next_ids_BT: The tokens at positions i+1.
            trace: Filled with the block's expert counts.

        Returns:
            Logits, float32 [B, T, V], and the block's own streams [B, T, M, D].

        Raises:
            ValueError: The model has no MTP block.
        """
        if not self.mtp:
            raise ValueError("this model has no MTP block (num_nextn_predict_layers is 0, or its drafts are DSpark)")
        computed = self._forward(trace).draft(streams_BTMD.flatten(0, 1), _plan(next_ids_BT, trace))
        return computed.logits.view(*next_ids_BT.shape, -1), computed.streams.view(streams_BTMD.shape)

    def fused_weights(self) -> list[list[Tensor]]:
        """Return the large weights, in the groups that share an input: backends pack each group side by side."""
        return [[self.head.weight], *(group for block in self.blocks for group in block.fused_weights())]

    def _forward(self, trace: Trace | None) -> Forward:
        """Return a forward without state; to bind it anew takes a millisecond, and training changes `top_k`."""
        trained = trace is not None and trace.index_scores
        ops = Reference(self.embed.weight.device, train_detached=trained, products=self.products)
        return Forward(self, ops, [ops.state({}) for _ in self.blocks])


def _plan(token_ids_BT: Tensor, trace: Trace | None) -> Plan:
    batch, tokens = token_ids_BT.shape
    slots, tables = [0] * batch, [()] * batch
    return Plan(token_ids_BT.flatten(), [tokens] * batch, [0] * batch, slots, tables, trace)


@torch.no_grad()
def initialize_(decoder: Decoder, generator: torch.Generator, std: float = 0.02) -> Decoder:
    """Initialise for training, in place: normal matrices, unit norms, zero sinks, random distinct hash experts.

    Residual streams start nearly unmixed (the diagonal of each mHC matrix dominates).
    """
    for name, parameter in decoder.named_parameters():
        if parameter.dim() >= 2 and not name.endswith("ape"):
            parameter.normal_(0.0, std, generator=generator)
        elif name.endswith(("norm.weight", "scale")):
            parameter.fill_(1.0)
        else:
            parameter.zero_()
    streams = decoder.spec.hc_mult
    diagonal = 3.0 * torch.eye(streams).flatten()
    for module in decoder.modules():
        if isinstance(module, Block):
            module.hc_attn_base[2 * streams :] = diagonal
            module.hc_ffn_base[2 * streams :] = diagonal
        elif isinstance(module, Gate) and module.router == "hash":
            draws = torch.rand(decoder.spec.vocab_size, decoder.spec.n_routed_experts, generator=generator)
            module.tid2eid.copy_(draws.argsort(dim=-1)[:, : module.active])
        elif isinstance(module, Gate):
            module.bias.zero_()
    return decoder
