"""`python -m agentkit_kernels.gpu [--rehearse] [--only NAME,...] [--out DIR]`."""

from __future__ import annotations

import sys

from agentkit_kernels.gpu.command import main
from agentkit_kernels.gpu.parts import PARTS

if __name__ == "__main__":
    sys.exit(main("agentkit_kernels.gpu", PARTS))
