"""The operations of a forward: the seam between the model and the backends that compute it.

The model (`agentkit_engine.model`) is written once, in calls of `Ops`. A backend implements them: `reference` in plain
differentiable torch, `cpu` in loops compiled by Numba, `triton` in Triton kernels. Arrays, packed weights and state
belong to the backend; the model passes them on, and at most slices rows, adds and reshapes them.

Contract of every operation: a row of a result depends on the same row of the arguments, on that row's position, and on
the state of that row's sequence, and on nothing else. Its bits do not change with the number or the content of the
other rows. Two operations read other rows of their own sequence: `compress` and `attend`, and only earlier ones.

Dimension key: N rows of a forward (the tokens of all sequences, end to end), B sequences, D hidden size, M residual
streams, V vocabulary, X outputs of a fused projection, Q query latent, H heads, K head size, R rotary size, G output
groups, O outputs per group, J index heads, C index head size, E experts, A active experts, I expert width, W compressed
entries, P chosen entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from agentkit_kernels.packed import PackedRows
from agentkit_kernels.trace import Trace

Array = Any
"""A backend's array: a torch tensor (`reference`, `triton`) or a numpy array (`cpu`)."""
Weight = Any
"""One or several matrices that share an input, in a backend's own layout."""
State = Any
"""Rows that one layer keeps of earlier tokens; see `Ops.state`."""

QUERY_BLOCK = 128
"""Tokens of one sequence whose attention is computed together; blocks start at multiples of this. A window's ring has
this many rows more than the window, so the rows of a block can be stored before its queries are computed."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The sequences of one forward, on the host.

    Attributes:
        ids: The token ids of all sequences, end to end.
        lengths: New tokens per sequence.
        starts: Position of each sequence's first new token.
        slots: Tail slot of each sequence.
        block_tables: Span ids of each sequence.
        trace: Filled by the `reference` backend, for training.
    """

    ids: Sequence[int] | Tensor
    lengths: Sequence[int]
    starts: Sequence[int]
    slots: Sequence[int] = ()
    block_tables: Sequence[Sequence[int]] = ()
    trace: Trace | None = None


Batch = Any
"""A `Plan` on the device, with `ids` and the number of `tokens`. The `reference` backend has rows of padding after
them."""


class HyperConnection(NamedTuple):
    """Parameters of one sub-layer's mHC read and write, and of the norm of its input.

    `fn` maps the M * D values of all streams to (2 + M) * M outputs: pre (M), post (M) and comb (M * M, row-major).
    `base` is added to them after scaling by `scale` [3] (for pre, post and comb).
    """

    fn: Weight
    base: Array
    scale: Array
    norm: Array
    norm_eps: float
    eps: float
    iterations: int


class HyperHead(NamedTuple):
    """Parameters of the final collapse of the streams, and of the output norm: fn [M, M * D], base [M], scale [1]."""

    fn: Weight
    base: Array
    scale: Array
    norm: Array
    norm_eps: float
    eps: float


class Heads(NamedTuple):
    """One layer's queries and keys: their sizes, and their columns in the fused projection of the layer's input.

    J (`index_heads`) is 0 in a layer without an indexer.
    """

    heads: int
    head_dim: int
    kv_column: int
    kv_norm: Array
    eps: float
    index_heads: int = 0
    index_head_dim: int = 0
    index_column: int = 0


class Compressor(NamedTuple):
    """One compressor: `ratio` tokens become an entry, averaged with a gate per channel.

    Attributes:
        prefix: `""` for attention entries, `"index_"` for index keys: its state is `entries`, `values` and `scores`
            with this prefix.
        column: Column of its values in the fused projection; its scores follow.
        ape: Added to the scores, [ratio, X], by position within the window.
        overlap: True for CSA, whose rows hold two series: entry w pools the first half of the rows of window w - 1 and
            the second half of those of window w.
        frequencies: Radians per position of each rotary pair, float32 [R/2].
    """

    prefix: str
    column: int
    ratio: int
    overlap: bool
    ape: Array
    norm: Array
    eps: float
    frequencies: Array


class Router(NamedTuple):
    """The choice of experts: from `table` [V, A] by token id, or by affinity plus `bias` [E]."""

    table: Array | None
    bias: Array | None
    active: int
    scale: float


class Ops(Protocol):
    """The operations of one backend. Arrays are float32 or, on a GPU, the backend's compute dtype."""

    name: str

    # --- memory ---

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Allocate zeros for a state pool; on a CPU each page is allocated when it is first written."""

    def state(self, pools: Mapping[str, Tensor]) -> State:
        """Return one layer's state pools as the backend reads and writes them.

        V4's pools: `window` [slots, ring, K] holds token t in row t mod ring. Each compressor has `entries` [spans + 1,
        entries per span, K], and the open rows `values` and `scores` [slots, rows, X], token t in row t mod rows; those
        of the indexer's compressor begin with `index_`. Without pools, `reference` keeps this forward's rows only, and
        is differentiable.

        Pools are float32, or uint8: `window` and `entries` then hold key-value rows in the format of
        `reference/quantize.py`, a slot or a span being a page, and `index_entries` E4M3 codes, with float32
        `index_scales` [spans + 1, entries per span, 1]. A forward reads its own rows as later ones will: rounded.
        """

    def weight(
        self, *parts_XK: Tensor | PackedRows, detached: Sequence[Tensor | PackedRows] = (), wide: bool = False
    ) -> Weight:
        """Pack matrices [X, K] that share an input. No gradient flows from the product with `detached` ones, which come
        last, to that input. With `wide` the product is float32 even where activations are not: logits, of tokens and of
        experts, are compared with each other."""

    def stack(self, *parts_EXK: Tensor | PackedRows) -> Weight:
        """Pack the experts' matrices [E, X, K] that share an input."""

    def table(self, rows: Tensor) -> Array:
        """Return a table whose rows are looked up: embeddings [V, D], or experts by token id [V, A]."""

    def vector(self, parameter: Tensor) -> Array:
        """Return a small parameter as the backend's operations take it, float32."""

    def settle(self, *, exact: bool, active: int = 1) -> None:
        """Choose the kernels of the products, once all weights are packed; `exact=False` drops the contract on bits.

        A token chooses `active` experts of a layer.
        """

    def batch(self, plan: Plan) -> Batch:
        """Move a plan to the device."""

    def array(self, rows: Tensor, batch: Batch) -> Array:
        """Return rows of an earlier forward as input of this one."""

    def tensor(self, array: Array) -> Tensor:
        """Return an array as a torch tensor, without a copy."""

    # --- rows ---

    def embed(self, batch: Batch, table: Array, streams: int) -> Array:
        """Return the embeddings of the batch's ids, repeated for every stream: [N, M, D]."""

    def linear(self, x: Array, weight: Weight) -> Array:
        """x · weightᵀ: [N, K] to [N, X]."""

    def grouped_linear(self, x: Array, weight: Weight, groups: int) -> Array:
        """Multiply each of G equal parts of a row by its part of a matrix [G * O, K]: [N, ...] to [N, G * O]."""

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """RMSNorm of the first `len(weight)` columns (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def swiglu(self, gate_up: Array, limit: float) -> Array:
        """silu(min(gate, limit)) * clamp(up, -limit, limit): [N, 2 * I] to [N, I]."""

    def take(self, x: Array, rows: Sequence[int]) -> Array:
        """Return some rows; `reference` pads them."""

    # --- residual streams (mHC: Xie et al. 2025, arXiv:2512.24880) ---

    def hc_pre(self, streams: Array, hc: HyperConnection) -> tuple[Array, Any]:
        """Return a sub-layer's normed input [N, D], and the weights for writing its output back (opaque)."""

    def hc_post(self, streams: Array, y: Array, mixing: Any) -> Array:
        """Write a sub-layer's output: stream k becomes post[k] * y + sum_j comb[j, k] * stream j."""

    def hc_post_pre(self, streams: Array, y: Array, mixing: Any, hc: HyperConnection) -> tuple[Array, Array, Any]:
        """`hc_post`, then `hc_pre` of the next sub-layer, in one pass over the streams where a backend can: the new
        streams, the input and the weights for the next write."""

    def hc_head(self, streams: Array, head: HyperHead) -> Array:
        """Collapse the streams into the normed input of the head: [N, M, D] to [N, D]."""

    # --- attention ---

    def rotations(self, batch: Batch, frequencies: Array) -> Array:
        """Return cosine and sine of every pair's angle at each row's position, interleaved: float32 [N, R]."""

    def qkv(
        self, q: Array, projected: Array, rotations: Array, heads: Heads, batch: Batch, state: State
    ) -> tuple[Array, Any, Array, Array]:
        """Norm and rotate a layer's queries and its key-value row; q [N, H * K + J * C] comes from the query latent.

        Returns:
            Queries [N, H, K], normed per head, rotated and scaled by K^-0.5; rows [N, K], which are both key and value,
            normed and rotated, as `attend` takes them (opaque); index queries [N, J, C], rotated; index weights [N, J],
            scaled by (J * C)^-0.5. A backend may store the rows in the window here already, if no query of the forward
            reads what they replace.
        """

    def compress(self, projected: Array, compressor: Compressor, batch: Batch, state: State) -> None:
        """Store each token's open row, and every entry that it completes.

        Entry w is RMSNorm(sum_t softmax_t(scores) * values), rotated to the position w * ratio. Source: the
        DeepSeek-V4 reference.
        """

    def index_topk(
        self, index_q: Array, index_weights: Array, batch: Batch, state: State, *, ratio: int, top_k: int
    ) -> Any:
        """Choose each query's `top_k` best entries among the (position + 1) // ratio that it may see (opaque).

        The score of entry w is sum_j weight[j] * relu(q[j] · index key w); ties go to the lowest entry. Source:
        DeepSeek-V3.2 (arXiv:2512.02556) and the DeepSeek-V4 reference.
        """

    def attend(
        self,
        q: Array,
        kv: Any,
        rotations: Array,
        sink: Array,
        batch: Batch,
        state: State,
        *,
        window: int,
        ratio: int = 0,
        topk: Any = None,
    ) -> Array:
        """Store the rows in the window, and attend to it, to compressed entries and to the sink: [N, H, K].

        A query sees the rows of the last `window` tokens, and the entries that `topk` chose, or all (position + 1) //
        `ratio` without it (none if `ratio` is 0). One softmax covers both and the sink [H], an extra score without a
        value. The result is rotated back by the query's position.
        """

    # --- mixture of experts ---

    def route(self, logits: Array, router: Router, batch: Batch) -> tuple[Array, Array]:
        """Return each token's experts, int64 [N, A], and their weights [N, A].

        Affinities are sqrt(softplus(logit)); the weights are the chosen affinities, scaled to sum to `router.scale`.
        Ties go to the lowest expert.
        """

    def experts(
        self,
        x: Array,
        experts: Array,
        weights: Array,
        w13: Weight,
        w2: Weight,
        limit: float,
        shared: Array,
        batch: Batch,
    ) -> Array:
        """Sum each token's weighted experts, in the order of its choice, and then `shared`: [N, D].

        An expert is w2 · swiglu(w13 · x), its hidden row multiplied by the token's weight.
        """
