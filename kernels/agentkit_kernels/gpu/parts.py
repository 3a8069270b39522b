"""The parts of the kernels, in the order in which they run."""

from __future__ import annotations

from agentkit_kernels.gpu.command import Part

_HERE = "agentkit_kernels.gpu"
PARTS = (
    Part("correctness", "", f"{_HERE}.correctness:correctness"),
    Part("sparse-decode", "H4", f"{_HERE}.attention:sparse_decode"),
    Part("hca-decode", "H5", f"{_HERE}.attention:hca_decode"),
    Part("sparse-prefill", "H6", f"{_HERE}.attention:sparse_prefill"),
    Part("index-topk-decode", "H7", f"{_HERE}.indexer:decode"),
    Part("index-prefill", "H8", f"{_HERE}.indexer:prefill"),
    Part("moe", "H9", f"{_HERE}.experts:moe"),
    Part("hc-boundary", "H10", f"{_HERE}.hyper_connections:hc_boundary"),
    Part("expert-streaming", "H13", f"{_HERE}.transfers:expert_streaming"),
    Part("tiers", "H14", f"{_HERE}.transfers:tiers"),
    Part("compressor-prefill", "H15", f"{_HERE}.compressor:prefill"),
    Part("kernels-decode", "", f"{_HERE}.catalogue:decode_calls"),
    Part("kernels-prefill", "", f"{_HERE}.catalogue:prefill_calls"),
)
