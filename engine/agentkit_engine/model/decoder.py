"""The decoder: embedding, layers over parallel residual streams, output head. Dimension key: `model/__init__.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agentkit_engine.model.attention import ForwardContext
from agentkit_engine.model.block import Block
from agentkit_engine.model.cache import Cache
from agentkit_engine.model.hyper_connections import collapse
from agentkit_engine.model.moe import Gate
from agentkit_engine.model.mtp import MTPBlock
from agentkit_engine.model.norm import RMSNorm
from agentkit_engine.model.rope import rotations
from agentkit_engine.model.trace import Trace
from agentkit_engine.spec import LayerSpec, ModelSpec


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
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        self.hc_head_fn = nn.Parameter(torch.zeros(spec.hc_mult, spec.hc_mult * spec.hidden_size))
        self.hc_head_base = nn.Parameter(torch.zeros(spec.hc_mult))
        self.hc_head_scale = nn.Parameter(torch.ones(1))
        self.mtp = nn.ModuleList(MTPBlock(spec, layer) for layer in spec.mtp_layers)

    @property
    def blocks(self) -> list[Block]:
        """Every decoder block: the main stack in order, then the MTP block if there is one."""
        return [block for block in (*self.layers, *self.mtp) if isinstance(block, Block)]

    def new_cache(self, batch_size: int = 1) -> Cache:
        """Return an empty cache for `batch_size` sequences that advance together."""
        return Cache(self.spec, batch_size)

    def forward(
        self,
        token_ids_BT: Tensor,
        cache: Cache | None = None,
        *,
        last_only: bool = False,
        trace: Trace | None = None,
    ) -> Tensor:
        """Return the logits of the tokens after `token_ids`, float32 [B, T, V] ([B, 1, V] with `last_only`).

        Args:
            token_ids_BT: The next T >= 1 tokens of every sequence, int64.
            cache: The state of the sequences' earlier tokens; these tokens are appended to it. None starts at position
                0 and is the only case that is differentiable.
            last_only: Compute only the last token's logits.
            trace: Filled with intermediate results for training.

        Raises:
            ValueError: `token_ids` is not [B, T] with T >= 1 and the cache's B.
        """
        if token_ids_BT.dim() != 2 or token_ids_BT.shape[1] == 0:
            raise ValueError(f"token_ids must have shape [B, T] with T >= 1, got {list(token_ids_BT.shape)}")
        if cache is None:
            cache = self.new_cache(token_ids_BT.shape[0])
        if cache.batch_size != token_ids_BT.shape[0]:
            raise ValueError(f"token_ids has {token_ids_BT.shape[0]} sequences, the cache holds {cache.batch_size}")
        context = self._context(self.spec.layers, cache.length, token_ids_BT, trace)
        streams_BTMD = self.embed(token_ids_BT).unsqueeze(2).repeat(1, 1, self.spec.hc_mult, 1)
        for block, layer_cache in zip(self.layers, cache.layers, strict=True):
            streams_BTMD = block(streams_BTMD, token_ids_BT, layer_cache, context)
        if trace is not None:
            trace.streams_BTMD = streams_BTMD
        if last_only:
            streams_BTMD = streams_BTMD[:, -1:]
        x_ND = collapse(
            streams_BTMD.flatten(0, 1),
            self.hc_head_fn,
            self.hc_head_base,
            self.hc_head_scale,
            norm_eps=self.spec.rms_norm_eps,
            eps=self.spec.hc_eps,
        )
        return self._logits(self.norm(x_ND).view(*streams_BTMD.shape[:2], -1))

    def draft_logits(
        self, streams_BTMD: Tensor, next_ids_BT: Tensor, cache: Cache | None = None, *, trace: Trace | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the MTP block at positions i: it reads token i+1 and predicts token i+2.

        Args:
            streams_BTMD: The main stack's streams at positions i (`Trace.streams_BTMD`, cut to T), or the streams
                that this method returned, to draft further.
            next_ids_BT: The tokens at positions i+1.
            cache: Holds the block's own window; positions continue where its last call ended. None starts at 0.
            trace: Filled with the block's expert counts.

        Returns:
            Logits, float32 [B, T, V], and the block's own streams [B, T, M, D].

        Raises:
            ValueError: The model has no MTP block.
        """
        if not self.mtp:
            raise ValueError("this model has no MTP block (num_nextn_predict_layers is 0, or its drafts are DSpark)")
        layer_cache = (cache or self.new_cache(next_ids_BT.shape[0])).mtp_layers[0]
        context = self._context(self.spec.mtp_layers, layer_cache.window.end, next_ids_BT, trace)
        block = self.mtp[0]
        assert isinstance(block, MTPBlock)
        x_BTD, streams_BTMD = block.draft(streams_BTMD, self.embed(next_ids_BT), next_ids_BT, layer_cache, context)
        return self._logits(x_BTD), streams_BTMD

    def _context(
        self, layers: tuple[LayerSpec, ...], start: int, token_ids_BT: Tensor, trace: Trace | None
    ) -> ForwardContext:
        positions_T = torch.arange(start, start + token_ids_BT.shape[1], device=token_ids_BT.device)
        rotary_dim = self.spec.qk_rope_head_dim
        forward = {rope: rotations(rope, positions_T, rotary_dim) for rope in {layer.rope for layer in layers}}
        return ForwardContext({rope: (turn, turn.conj_physical()) for rope, turn in forward.items()}, trace)

    def _logits(self, x_BTD: Tensor) -> Tensor:
        return F.linear(x_BTD.float(), self.head.weight.float())


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
