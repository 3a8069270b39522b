"""How weights lie in memory for products on a CPU: inputs first, and side by side what is multiplied together.

A decoder's parameters are views of that, so that memory holds weights once. Those of a checkpoint are read straight to
their places (`lay_out`); those of a decoder that was made otherwise are moved when they are packed.

Dimension key: E experts, K inputs, O outputs of one parameter, X outputs of all that lie side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from agentkit_engine.model.attention import Attention
from agentkit_engine.model.decoder import Decoder


def packed(*parts_OK: Tensor) -> Tensor:
    """Weights side by side, [K, X], or [E, K, X] of weights [E, O, K]; parameters become views of it.

    They are bfloat16 where all parts are, else float32.
    """
    if (whole_KX := _whole(parts_OK)) is not None:
        return whole_KX
    whole_KX, places_OK = _side_by_side(parts_OK)
    for part_OK, place_OK in zip(parts_OK, places_OK, strict=True):
        place_OK.copy_(part_OK.detach())
        if isinstance(part_OK, nn.Parameter) and part_OK.dtype == whole_KX.dtype:
            part_OK.data = place_OK
    return whole_KX


def lay_out(decoder: Decoder) -> None:
    """Give the large weights of a decoder, which hold nothing yet, the places where `packed` leaves them."""
    for parts_OK in _groups(decoder):
        for part_OK, place_OK in zip(parts_OK, _side_by_side(parts_OK)[1], strict=True):
            if part_OK.dtype == place_OK.dtype:
                part_OK.data = place_OK


def projections(attention: Attention) -> tuple[list[Tensor], list[Tensor]]:
    """What is multiplied with a layer's input, and what with the latent query."""
    parts, latent = [attention.wq_a, attention.wkv], [attention.wq_b]
    compressors = [attention.compressor] if attention.compressor is not None else []
    if attention.indexer is not None:
        parts.append(attention.indexer.weights_proj)
        latent.append(attention.indexer.wq_b)
        compressors.append(attention.indexer.compressor)
    for compressor in compressors:
        parts += [compressor.wkv, compressor.wgate]
    return [part.weight for part in parts], [part.weight for part in latent]


def _groups(decoder: Decoder) -> Iterator[Sequence[Tensor]]:
    yield [decoder.head.weight]
    for block in decoder.blocks:
        yield from projections(block.attn)
        yield [block.attn.wo_b.weight]
        experts, shared = block.ffn.experts, block.ffn.shared_experts
        yield from ([experts.w1, experts.w3], [experts.w2])
        yield from ([shared.w1.weight, shared.w3.weight], [shared.w2.weight])


def _side_by_side(parts_OK: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Memory for weights, and where each of them lies in it, [.., O, K]."""
    *experts, _, inputs = parts_OK[0].shape
    outputs = [part_OK.shape[-2] for part_OK in parts_OK]
    dtype = torch.bfloat16 if all(part_OK.dtype == torch.bfloat16 for part_OK in parts_OK) else torch.float32
    whole_KX = torch.empty(*experts, inputs, sum(outputs), dtype=dtype)
    return whole_KX, [columns_KO.mT for columns_KO in torch.split(whole_KX, outputs, -1)]


def _whole(parts_OK: Sequence[Tensor]) -> Tensor | None:
    """The [.., K, X] that these are views of, where they are all of it."""
    *experts, _, inputs = parts_OK[0].shape
    width = sum(part_OK.shape[-2] for part_OK in parts_OK)
    strides = (*[inputs * width for _ in experts], width, 1)
    place, dtype = parts_OK[0].data_ptr(), parts_OK[0].dtype
    for part_OK in parts_OK:
        if part_OK.dtype != dtype or part_OK.mT.stride() != strides or part_OK.data_ptr() != place:
            return None
        place += part_OK.itemsize * part_OK.shape[-2]
    return parts_OK[0].detach().as_strided((*experts, inputs, width), strides)
