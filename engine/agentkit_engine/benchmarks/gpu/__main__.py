"""`python -m agentkit_engine.benchmarks.gpu [--rehearse] [--only NAME,...] [--out DIR]`: the kernels' parts, and then
those of a slice of the model."""

from __future__ import annotations

import sys

from agentkit_kernels.gpu import parts
from agentkit_kernels.gpu.command import Part, main

_SLICE = "agentkit_engine.benchmarks.gpu.slice"
PARTS = (
    *parts.PARTS,
    Part("slice-decode", "H1", f"{_SLICE}:slice_decode"),
    Part("context-growth", "H2", f"{_SLICE}:context_growth"),
    Part("sixteen-layers", "H2", f"{_SLICE}:sixteen_layers"),
    Part("kernels-per-layer", "H3", f"{_SLICE}:kernels_per_layer"),
    Part("slice-prefill", "H11", f"{_SLICE}:slice_prefill"),
    Part("depth-prefill", "H12", f"{_SLICE}:depth_prefill"),
    Part("restore", "H14", f"{_SLICE}:restore"),
)

if __name__ == "__main__":
    sys.exit(main("agentkit_engine.benchmarks.gpu", PARTS))
