"""The DeepSeek-V4 decoder: its parameters (`parameters.py`, `decoder.py`) and its forward (`forward.py`).

Dimension key, for the whole folder: B batch, T tokens of this forward, N = B*T rows, D hidden size, V vocabulary,
W compressed entries, H attention heads, K head size, Q query latent, G output groups, O outputs per group, J index
heads, C index head size, M residual streams (hc_mult), E experts, A active experts per token, I expert width.
"""

from agentkit_engine.model.decoder import Decoder, initialize_
from agentkit_engine.model.trace import indexer_kl
from agentkit_kernels.trace import IndexTrace, Trace

__all__ = ["Decoder", "IndexTrace", "Trace", "indexer_kl", "initialize_"]
