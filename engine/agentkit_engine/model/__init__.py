"""The DeepSeek-V4 decoder in plain torch: one file per idea, with `Decoder` on top.

Parameter names are the official tensor names, except that routed experts are stacked:
`layers.N.ffn.experts.{w1,w2,w3}` of shape [experts, out, in]. Computation is in float32 where the reference's is. The
reference's quantisation of activations (FP8 round trip of KV rows and linear inputs, Hadamard rotation and FP4 round
trip in the indexer) is not simulated: in exact arithmetic the rotation cancels and the rest is noise.

Dimension key, for the whole folder: B batch, T tokens of this forward, N = B*T rows, D hidden size, V vocabulary,
S keys, W compressed entries, H attention heads, K head size, R rotary size, Q query latent, G output groups,
J index heads, C index head size, M residual streams (hc_mult), E experts, A active experts per token, I expert width.
"""

from agentkit_engine.model.cache import Cache
from agentkit_engine.model.decoder import Decoder, initialize_
from agentkit_engine.model.trace import IndexTrace, Trace, indexer_kl

__all__ = ["Cache", "Decoder", "IndexTrace", "Trace", "indexer_kl", "initialize_"]
