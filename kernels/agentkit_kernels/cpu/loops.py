"""CPU kernels for everything in a forward except its matrix products, compiled by Numba.

A decoding step consists of some thousand tiny operations, and dispatching one in torch costs more than its arithmetic.
Each kernel here is one step of the model, as loops over all rows of a forward. It computes every row by itself, with
the same instructions, in an order that depends on the row's position only, so its bits cannot depend on the rows beside
it. The torch twins are in `agentkit_kernels.reference`, with formulas and sources.

There are two kinds of arithmetic. `strict` code may fuse a product and a sum and nothing else: its sums are chains in
loop order. `reduced` code may also sum a row in lanes, which is faster. All kernels are in one file because Numba
recompiles a cached kernel when its own file changes, and does not notice changes in another file.

Dimension key: N rows, D hidden size, M residual streams, X outputs of a fused projection, K head size (inputs of a
product in `multiply`), O outputs, H heads, R rotary size, B sequences, S keys, E experts, A active experts, I expert
width, J index heads, P picks. Arrays are float32 and C-contiguous unless said otherwise; integers are int64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np
import torch
from numba.extending import overload
from numpy.typing import NDArray

from agentkit_kernels.ops import QUERY_BLOCK
from agentkit_kernels.reference.quantize import (
    ACTIVATION_FLOOR,
    ACTIVATION_GROUP,
    E2M1_MAX,
    E4M3_MAX,
    FP4_GROUP,
    KV_GROUP,
    KV_SCALES,
)

Floats = NDArray[np.float32]
Halves = NDArray[np.uint16]
"""bfloat16 as uint16, because numpy has no bfloat16."""
Bytes = NDArray[np.uint8]
Weights = Floats | Halves
Stored = Floats | Bytes
"""Rows of pools: float32, or packed; see `_store_row`."""
Ints = NDArray[np.int64]
Ints32 = NDArray[np.int32]
Function = TypeVar("Function", bound=Callable[..., Any])

LINE = 16
"""Floats per cache line."""
OUTPUTS_TOGETHER, INPUTS_TOGETHER = 4096, 16
"""Tile of weights that `multiply` applies to all rows before it goes on (256 KiB in float32, so that it stays in the
cache)."""


def _compiled(function: Function, fastmath: set[str], signature: str | None = None) -> Function:
    def compiled(cache: bool) -> Function:
        decorate = numba.njit(signature, cache=cache, nogil=True, error_model="numpy", fastmath=fastmath)
        return cast(Function, decorate(function))

    try:
        return compiled(cache=True)
    except RuntimeError:  # there is no writable folder for a cache
        return compiled(cache=False)


def strict(function: Function) -> Function:
    """Compile on first use; sums keep their order."""
    return _compiled(function, {"contract"})


def at_import(signature: str) -> Callable[[Function], Function]:
    """Like `strict`, but compile eagerly, at import. One such kernel starts the compiler, which takes as long as its
    import."""
    return lambda function: _compiled(function, {"contract"}, signature)


def reduced(function: Function) -> Function:
    """Compile on first use; sums over a row may be computed in lanes."""
    return _compiled(function, {"contract", "reassoc"})


def cache_folder() -> Path | None:
    """Return the folder in which Numba caches these kernels; None without a writable one."""
    path: str | None = attend.stats.cache_path  # type: ignore[attr-defined]
    return None if path is None else Path(path)


@strict
def _lines(rows: int, size: int) -> Floats:
    """Allocate memory aligned to cache lines: reading vectors that cross two lines takes twice as long."""
    flat = np.empty(rows * size + LINE, np.float32)
    start = -(flat.ctypes.data // 4) % LINE
    return flat[start : start + rows * size].reshape(rows, size)


# --- exp ---------------------------------------------------------------------------------------------------------

_ZERO, _ONE, _TWO, _HALF = np.float32(0.0), np.float32(1.0), np.float32(2.0), np.float32(0.5)
_LOWEST, _HIGHEST, _LOG2_E = np.float32(-87.0), np.float32(88.0), np.float32(1.44269504)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_P0, _P1, _P2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_P3, _P4, _P5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
_INFINITY, _MINUS_INFINITY = np.float32(np.inf), np.float32(-np.inf)
_ALL_BUT_SIGN = np.int32(0x7FFFFFFF)
E4M3: Floats = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
"""The value of each code."""
_LEAST_AMAX, _TWO_TO_14 = np.float32(ACTIVATION_FLOOR), np.float32(16384.0)
_LARGEST_BITS, _LARGEST_FP4_BITS = np.float32(E4M3_MAX).view(np.int32), np.float32(E2M1_MAX).view(np.int32)
_FOUR = np.float32(4.0)


@at_import("float32(float32)")
def exp(x: np.float32) -> np.float32:
    """e**x to within 2 units in the last place, 0 below -87; free of branches, so that loops over it vectorise.

    x = n ln 2 + r with |r| <= ln 2 / 2; 2**n goes into the exponent, e**r is a polynomial (Cephes' `expf`).
    """
    bounded = _LOWEST if x < _LOWEST else x
    bounded = _HIGHEST if bounded > _HIGHEST else bounded
    n = np.floor(bounded * _LOG2_E + _HALF)
    r = bounded - n * _LN2_HIGH
    r = r - n * _LN2_LOW
    series = ((((_P0 * r + _P1) * r + _P2) * r + _P3) * r + _P4) * r + _P5
    power = np.int32((np.int32(n) + 127) << 23).view(np.float32)
    value: np.float32 = _ZERO if x < _LOWEST else (series * r * r + r + _ONE) * power
    return value


@strict
def sigmoid(x: np.float32) -> np.float32:
    value: np.float32 = _ONE / (_ONE + exp(-x))
    return value


# --- products ----------------------------------------------------------------------------------------------------


def _wide(weight: Any) -> np.float32:
    """Return a weight as float32. bfloat16 is the upper half of a float32, so products with either have the same
    bits."""
    raise NotImplementedError("exists in kernels only, for each type of weights")


@overload(_wide, inline="always")
def _wide_of(weight: Any) -> Callable[[Any], Any]:
    def as_it_is(weight: Any) -> Any:
        return weight

    def upper_half(weight: Any) -> Any:
        return np.uint32(np.uint32(weight) << np.uint32(16)).view(np.float32)

    return as_it_is if isinstance(weight, numba.types.Float) else upper_half


@strict
def multiply(x_NK: Floats, w_KO: Weights, first: int, last: int, out_NX: Floats, column: int) -> None:
    """out = x @ w for a few rows and the columns `first` to `last` of w, at the speed of reading the weights.

    Each output is a chain of fused multiply-adds over all inputs, as in `panels.multiply`. Weights are read along their
    rows, in tiles that all rows use while the cache holds them. `column` is the column of `out` that takes w's first.
    """
    rows, inputs = x_NK.shape
    for begin in range(first, last, OUTPUTS_TOGETHER):
        size = min(OUTPUTS_TOGETHER, last - begin)
        for low in range(0, inputs, INPUTS_TOGETHER):
            high = min(low + INPUTS_TOGETHER, inputs)
            for n in range(rows):
                some = out_NX[n, column + begin : column + begin + size]
                if low == 0:
                    some[:] = _ZERO
                k = low
                while k + 4 <= high:
                    a, b, c, d = x_NK[n, k], x_NK[n, k + 1], x_NK[n, k + 2], x_NK[n, k + 3]
                    w_a, w_b = w_KO[k, begin : begin + size], w_KO[k + 1, begin : begin + size]
                    w_c, w_d = w_KO[k + 2, begin : begin + size], w_KO[k + 3, begin : begin + size]
                    for o in range(size):
                        two = (some[o] + a * _wide(w_a[o])) + b * _wide(w_b[o])
                        some[o] = (two + c * _wide(w_c[o])) + d * _wide(w_d[o])
                    k += 4
                while k < high:
                    a, w_a = x_NK[n, k], w_KO[k, begin : begin + size]
                    for o in range(size):
                        some[o] += a * _wide(w_a[o])
                    k += 1


# --- norms and rotations -----------------------------------------------------------------------------------------


@reduced
def _inverse_rms(x: Floats, eps: np.float32) -> np.float32:
    total = _ZERO
    for i in range(x.shape[0]):
        total += x[i] * x[i]
    value: np.float32 = _ONE / np.sqrt(total / np.float32(x.shape[0]) + eps)
    return value


@reduced
def rms_norm(x_NX: Floats, weight_K: Floats, eps: np.float32, out_NK: Floats) -> None:
    """RMSNorm of the first K columns."""
    size = weight_K.shape[0]
    for n in range(x_NX.shape[0]):
        scale = _inverse_rms(x_NX[n, :size], eps)
        for k in range(size):
            out_NK[n, k] = x_NX[n, k] * scale * weight_K[k]


@strict
def rotations(positions_N: Ints, frequencies: Floats, turns_NR: Floats) -> None:
    """Cosine and sine of every pair's angle, interleaved; the angle is a float32 product, as in the reference."""
    for n in range(positions_N.shape[0]):
        _rotations_at(positions_N[n], frequencies, turns_NR[n])


@strict
def _rotations_at(position: int, frequencies: Floats, turn_R: Floats) -> None:
    for pair in range(frequencies.shape[0]):
        angle = np.float32(position) * frequencies[pair]
        turn_R[2 * pair] = math.cos(angle)
        turn_R[2 * pair + 1] = math.sin(angle)


@strict
def _rotate(x_K: Floats, turn_R: Floats, direction: np.float32) -> None:
    """Rotate the last R values in place, pair by pair; direction -1 is the inverse rotation."""
    first = x_K.shape[0] - turn_R.shape[0]
    for pair in range(turn_R.shape[0] // 2):
        cosine, sine = turn_R[2 * pair], turn_R[2 * pair + 1] * direction
        a, b = x_K[first + 2 * pair], x_K[first + 2 * pair + 1]
        x_K[first + 2 * pair] = a * cosine - b * sine
        x_K[first + 2 * pair + 1] = a * sine + b * cosine


# --- stored rows -------------------------------------------------------------------------------------------------


def _store_row(row_K: Floats, stored: Stored, row: int, per_page: int, rotary: int, scales_S: Floats) -> None:
    """Store a row as row `row` of pages of `per_page` rows: floats as they are; in bytes as a key-value row of
    `reference/quantize.py`, or, if there are `scales`, as an index key."""
    raise NotImplementedError("exists in kernels only, for each type of stored rows")


def _load_row(stored: Stored, row: int, per_page: int, rotary: int, to_SK: Floats, place: int) -> None:
    """Read a row that `_store_row` stored without scales."""
    raise NotImplementedError("exists in kernels only, for each type of stored rows")


@overload(_store_row, inline="always")
def _store_row_as(row_K: Any, stored: Any, row: Any, per_page: Any, rotary: Any, scales_S: Any) -> Callable[..., None]:
    def as_it_is(row_K: Any, stored: Any, row: Any, per_page: Any, rotary: Any, scales_S: Any) -> None:
        for k in range(row_K.shape[0]):  # assigning a slice would spend longer on checking shapes
            stored[row, k] = row_K[k]

    def in_bytes(row_K: Any, stored: Any, row: Any, per_page: Any, rotary: Any, scales_S: Any) -> None:
        if scales_S.shape[0]:
            scales_S[row] = _power(_encode(row_K, 0, row_K.shape[0], stored[row], 0))
        else:
            encode_row(row_K, stored.reshape(-1), row, per_page, rotary)

    return as_it_is if isinstance(stored.dtype, numba.types.Float) else in_bytes


@overload(_load_row, inline="always")
def _load_row_as(stored: Any, row: Any, per_page: Any, rotary: Any, to_SK: Any, place: Any) -> Callable[..., None]:
    def as_it_is(stored: Any, row: Any, per_page: Any, rotary: Any, to_SK: Any, place: Any) -> None:
        for k in range(to_SK.shape[1]):
            to_SK[place, k] = stored[row, k]

    def in_bytes(stored: Any, row: Any, per_page: Any, rotary: Any, to_SK: Any, place: Any) -> None:
        decode_row(stored.reshape(-1), row, per_page, rotary, to_SK, place)

    return as_it_is if isinstance(stored.dtype, numba.types.Float) else in_bytes


@strict
def _row_places(row: int, per_page: int, size: int, rotary: int) -> tuple[int, int]:
    """Return where a row of a page begins, and where its scales do, which follow the data of all rows."""
    data, place = size + rotary, row % per_page
    page = (row - place) * (data + KV_SCALES)
    return page + place * data, page + per_page * data + place * KV_SCALES


@strict
def encode_row(row_K: Floats, stored: Bytes, row: int, per_page: int, rotary: int) -> None:
    """Write a key-value row into pages, flat; see `reference.quantize.store_kv_rows`."""
    plain = row_K.shape[0] - rotary
    data, scales = _row_places(row, per_page, row_K.shape[0], rotary)
    for group in range(plain // KV_GROUP, KV_SCALES):
        stored[scales + group] = 0  # each byte is written once: other threads may be writing and reading the same row
    for group in range(plain // KV_GROUP):
        stored[scales + group] = _encode(row_K, group * KV_GROUP, KV_GROUP, stored, data + group * KV_GROUP)
    for r in range(rotary):  # rounded to bfloat16, ties to even
        bits = np.float32(row_K[plain + r]).view(np.uint32)
        half = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        half = np.uint32(0x7FC0) if row_K[plain + r] != row_K[plain + r] else half
        stored[data + plain + 2 * r] = half & np.uint32(0xFF)
        stored[data + plain + 2 * r + 1] = half >> np.uint32(8)


@strict
def decode_row(stored: Bytes, row: int, per_page: int, rotary: int, to_SK: Floats, place: int) -> None:
    """Read what `encode_row` wrote."""
    plain = to_SK.shape[1] - rotary
    data, scales = _row_places(row, per_page, to_SK.shape[1], rotary)
    for group in range(plain // KV_GROUP):
        scale, first = _power(stored[scales + group]), group * KV_GROUP
        for k in range(first, first + KV_GROUP):
            to_SK[place, k] = E4M3[stored[data + k]] * scale
    for r in range(rotary):
        low, high = stored[data + plain + 2 * r], stored[data + plain + 2 * r + 1]
        bits = np.uint32(np.uint32(high) << np.uint32(24)) | np.uint32(np.uint32(low) << np.uint32(16))
        to_SK[place, plain + r] = np.uint32(bits).view(np.float32)


@strict
def _encode(x: Floats, first: int, count: int, codes: Bytes, place: int) -> int:
    """Write E4M3 codes of `count` values from `first` on, and return their scale's E8M0 byte.

    It is that of the least power of two that brings them within 448. The difference of two floats' bits, read as a
    fixed-point number, lies between the same integers as the logarithm of their ratio.
    """
    most = _LEAST_AMAX
    for k in range(first, first + count):
        most = abs(x[k]) if abs(x[k]) > most else most
    above = np.float32(most).view(np.int32) - _LARGEST_BITS
    byte = int(((above + np.int32(0x7FFFFF)) >> np.int32(23)) + np.int32(127))
    inverse = _power(254 - byte)
    for k in range(count):
        value = np.float32(x[first + k] * inverse)
        bits = value.view(np.int32)
        magnitude = bits & _ALL_BUT_SIGN
        code = ((magnitude + np.int32(0x7FFFF) + ((magnitude >> np.int32(20)) & np.int32(1))) >> np.int32(20)) - 960
        # Adding 2^14, whose last bit is worth 2^-9, rounds to a multiple of the least code.
        small = np.float32(abs(value) + _TWO_TO_14).view(np.int32) - np.int32(0x46800000)
        code = small if magnitude < np.int32(0x3C800000) else code  # 2^-6
        code = np.int32(0x7E) if magnitude > _LARGEST_BITS else code
        code = np.int32(0x7F) if magnitude > np.int32(0x7F800000) else code  # NaN
        codes[place + k] = code | ((bits >> np.int32(24)) & np.int32(0x80))
    return byte


@strict
def round_activations(x_NK: Floats, out_NK: Floats) -> None:
    """Round rows to FP8, with a power of two per `ACTIVATION_GROUP` columns."""
    size = x_NK.shape[1]
    codes = np.empty(ACTIVATION_GROUP, np.uint8)
    for n in range(x_NK.shape[0]):
        for first in range(0, size, ACTIVATION_GROUP):
            count = min(ACTIVATION_GROUP, size - first)
            scale = _power(_encode(x_NK[n], first, count, codes, 0))
            for k in range(count):
                out_NK[n, first + k] = E4M3[codes[k]] * scale


@strict
def round_index(x_NJC: Floats) -> None:
    """Rotate index queries by the Hadamard matrix, and round them to FP4, in place."""
    for n in range(x_NJC.shape[0]):
        for j in range(x_NJC.shape[1]):
            _round_index(x_NJC[n, j])


@strict
def _round_index(x_C: Floats) -> None:
    """Sums and differences of columns give the product with Sylvester's matrix; each group of 32 has a power of two."""
    size, half = x_C.shape[0], 1
    while half < size:
        for first in range(0, size, 2 * half):
            for c in range(first, first + half):
                x_C[c], x_C[c + half] = x_C[c] + x_C[c + half], x_C[c] - x_C[c + half]
        half *= 2
    root = np.sqrt(np.float32(size))
    for first in range(0, size, FP4_GROUP):
        most = _ZERO
        for c in range(first, first + FP4_GROUP):
            x_C[c] /= root
            most = abs(x_C[c]) if abs(x_C[c]) > most else most
        above = np.float32(most).view(np.int32) - _LARGEST_FP4_BITS
        byte = max(1, int(((above + np.int32(0x7FFFFF)) >> np.int32(23)) + np.int32(127)))
        scale, inverse = _power(byte), _power(254 - byte)
        for c in range(first, first + FP4_GROUP):
            x = abs(x_C[c]) * inverse
            step = _HALF if x < _TWO else (_ONE if x < _FOUR else _TWO)  # between neighbouring codes
            rounded = np.float32(np.rint(x / step)) * step
            x_C[c] = np.copysign(rounded, x_C[c]) * scale


@strict
def _power(byte: int) -> np.float32:
    """Return 2^(byte - 127), and 0 for byte 0, which belongs to rows that were never written."""
    value: np.float32 = np.uint32(np.uint32(byte) << np.uint32(23)).view(np.float32)
    return value


# --- hyper-connections -------------------------------------------------------------------------------------------


@reduced
def connect(
    streams_NMD: Floats,
    raw_NX: Floats,
    base_X: Floats,
    scale_3: Floats,
    norm_D: Floats,
    norm_eps: np.float32,
    eps: np.float32,
    iterations: int,
    first: int,
    last: int,
    x_ND: Floats,
    post_NM: Floats,
    comb_NMM: Floats,
) -> None:
    """Compute the normed inputs of a sub-layer for the rows `first` to `last`, and the maps for writing its outputs
    back; `raw` is fn · streams.

    The M x M matrix is a softmax over rows + eps, whose columns, then rows and columns in turn, are divided by their
    sum + eps (Sinkhorn).
    """
    size, flat_NX = streams_NMD.shape[1], streams_NMD.reshape(streams_NMD.shape[0], -1)
    mix, pre = np.empty(base_X.shape[0], np.float32), np.empty(size, np.float32)
    for n in range(first, last):
        scale = _inverse_rms(flat_NX[n], norm_eps)
        for x in range(base_X.shape[0]):
            mix[x] = raw_NX[n, x] * scale * scale_3[min(x // size, 2)] + base_X[x]
        for m in range(size):
            pre[m] = sigmoid(mix[m]) + eps
            post_NM[n, m] = _TWO * sigmoid(mix[size + m])
        comb = comb_NMM[n]
        for j in range(size):
            logits = mix[(2 + j) * size : (3 + j) * size]
            most, total = logits[0], _ZERO
            for k in range(1, size):
                most = logits[k] if logits[k] > most else most
            for k in range(size):
                comb[j, k] = exp(logits[k] - most)
                total += comb[j, k]
            for k in range(size):
                comb[j, k] = comb[j, k] / total + eps
        for iteration in range(iterations):
            if iteration:
                for j in range(size):
                    total = eps
                    for k in range(size):
                        total += comb[j, k]
                    for k in range(size):
                        comb[j, k] /= total
            for k in range(size):
                total = eps
                for j in range(size):
                    total += comb[j, k]
                for j in range(size):
                    comb[j, k] /= total
        _read(streams_NMD[n], pre, norm_D, norm_eps, x_ND[n])


@reduced
def collapse(
    streams_NMD: Floats,
    raw_NM: Floats,
    base_M: Floats,
    scale_1: Floats,
    norm_D: Floats,
    norm_eps: np.float32,
    eps: np.float32,
    x_ND: Floats,
) -> None:
    """Collapse the streams into the normed input of the head."""
    pre, flat_NX = np.empty(base_M.shape[0], np.float32), streams_NMD.reshape(streams_NMD.shape[0], -1)
    for n in range(streams_NMD.shape[0]):
        rms = _inverse_rms(flat_NX[n], norm_eps)
        for m in range(base_M.shape[0]):
            pre[m] = sigmoid(raw_NM[n, m] * rms * scale_1[0] + base_M[m]) + eps
        _read(streams_NMD[n], pre, norm_D, norm_eps, x_ND[n])


@reduced
def _read(streams_MD: Floats, pre_M: Floats, norm_D: Floats, norm_eps: np.float32, x_D: Floats) -> None:
    for d in range(x_D.shape[0]):
        x_D[d] = pre_M[0] * streams_MD[0, d]
    for m in range(1, pre_M.shape[0]):
        weight, stream = pre_M[m], streams_MD[m]
        for d in range(x_D.shape[0]):
            x_D[d] += weight * stream[d]
    scale = _inverse_rms(x_D, norm_eps)
    for d in range(x_D.shape[0]):
        x_D[d] = x_D[d] * scale * norm_D[d]


@reduced
def write(
    streams_NMD: Floats, y_ND: Floats, post_NM: Floats, comb_NMM: Floats, first: int, last: int, out_NMD: Floats
) -> None:
    """out_k = post_k * y + sum_j comb[j, k] * streams_j, for the rows `first` to `last`."""
    size, dim = streams_NMD.shape[1:]
    for n in range(first, last):
        y = y_ND[n]
        for k in range(size):
            out, weight = out_NMD[n, k], post_NM[n, k]
            for d in range(dim):
                out[d] = weight * y[d]
            for j in range(size):
                weight, stream = comb_NMM[n, j, k], streams_NMD[n, j]
                for d in range(dim):
                    out[d] += weight * stream[d]


# --- attention ---------------------------------------------------------------------------------------------------


@reduced
def heads(
    q_NX: Floats,
    projected_NX: Floats,
    column: int,
    index_column: int,
    kv_norm_K: Floats,
    turns_NR: Floats,
    eps: np.float32,
    first: int,
    last: int,
    q_NHK: Floats,
    kv_NK: Floats,
    q_index_NJC: Floats,
    weights_NJ: Floats,
) -> None:
    """Compute the queries of the rows `first` to `last` (normed per head, rotated, scaled by K^-0.5), their key-value
    rows (from column `column` of `projected`), and, unless J is 0, the indexer's queries and its head weights (from
    column `index_column`)."""
    num_heads, size = q_NHK.shape[1:]
    _, index_heads, index_size = q_index_NJC.shape
    scale, at = np.float32(size) ** -_HALF, num_heads * size
    index_scale = np.float32(max(1, index_heads * index_size)) ** -_HALF
    for n in range(first, last):
        for h in range(num_heads):
            q = q_NHK[n, h]
            q[:] = q_NX[n, h * size : (h + 1) * size]
            norm = _inverse_rms(q, eps)
            for k in range(size):
                q[k] = q[k] * norm
            _rotate(q, turns_NR[n], _ONE)
            for k in range(size):
                q[k] = q[k] * scale
        kv = projected_NX[n, column : column + size]
        norm = _inverse_rms(kv, eps)
        for k in range(size):
            kv_NK[n, k] = kv[k] * norm * kv_norm_K[k]
        _rotate(kv_NK[n], turns_NR[n], _ONE)
        for j in range(index_heads):
            q_index_NJC[n, j] = q_NX[n, at + j * index_size : at + (j + 1) * index_size]
            _rotate(q_index_NJC[n, j], turns_NR[n], _ONE)
            weights_NJ[n, j] = projected_NX[n, index_column + j] * index_scale


@reduced
def attend(
    q_NHK: Floats,
    kv_NK: Floats,
    turns_NR: Floats,
    rows_B1: Ints,
    positions_N: Ints,
    slots_B: Ints,
    ring_SRK: Stored,
    window: int,
    ratio: int,
    entries_SK: Stored,
    per_span: int,
    tables_BX: Ints,
    picks_NP: Ints,
    counts_N: Ints,
    sink_H: Floats,
    first_head: int,
    last_head: int,
    out_NHK: Floats,
) -> None:
    """Store the new rows in their rings, attend to the window, the entries and the sink with the heads `first_head` to
    `last_head`, and rotate the result back.

    Sequence b has the rows from `rows[b]` to `rows[b + 1]`. If P is 0, a query attends to all entries that are
    complete at its position (none if `ratio` is 0), otherwise to its first `counts` picks. Rows are read back from
    where they are stored, so that all queries see the same bits.
    """
    num_heads, size = last_head - first_head, q_NHK.shape[2]
    rotary, rings_SK = turns_NR.shape[1], ring_SRK.reshape(-1, ring_SRK.shape[2])
    ring, picking, most = ring_SRK.shape[1], picks_NP.shape[1] > 0, 0
    for n in range(rows_B1[0], rows_B1[-1]):
        seen = counts_N[n] if picking else ((positions_N[n] + 1) // ratio if ratio else 0)
        most = max(most, seen)
    scores = _lines(num_heads, -(-(window + most) // LINE) * LINE)
    near_SK, far_SK = _lines(window + QUERY_BLOCK, size), _lines(most, size)
    no_scales = np.empty(0, np.float32)
    for b in range(slots_B.shape[0]):
        slot, filled = slots_B[b] * ring, 0
        for low in range(rows_B1[b], rows_B1[b + 1], QUERY_BLOCK):
            high = min(low + QUERY_BLOCK, rows_B1[b + 1])
            for n in range(low, high):
                _store_row(kv_NK[n], rings_SK, slot + positions_N[n] % ring, ring, rotary, no_scales)
            begin, end = max(0, positions_N[low] + 1 - window), positions_N[high - 1] + 1
            for position in range(begin, end):
                _load_row(rings_SK, slot + position % ring, ring, rotary, near_SK, position - begin)
            if not picking:
                count = end // ratio if ratio else 0
                for entry in range(filled, count):
                    span = entry // per_span
                    row = (tables_BX[b, span] - span) * per_span + entry
                    _load_row(entries_SK, row, per_span, rotary, far_SK, entry)
                filled = count
            for n in range(low, high):
                position = positions_N[n]
                count = counts_N[n] if picking else ((position + 1) // ratio if ratio else 0)
                if picking:
                    for s in range(count):
                        span = picks_NP[n, s] // per_span
                        row = (tables_BX[b, span] - span) * per_span + picks_NP[n, s]
                        _load_row(entries_SK, row, per_span, rotary, far_SK, s)
                near = near_SK[max(0, position + 1 - window) - begin : position + 1 - begin]
                _score(q_NHK[n, first_head:last_head], near, scores, 0)
                _score(q_NHK[n, first_head:last_head], far_SK[:count], scores, near.shape[0])
                for h in range(first_head, last_head):
                    score, out = scores[h - first_head, : near.shape[0] + count], out_NHK[n, h]
                    highest = sink_H[h]
                    for s in range(score.shape[0]):
                        highest = score[s] if score[s] > highest else highest
                    total = exp(sink_H[h] - highest)
                    for s in range(score.shape[0]):
                        score[s] = exp(score[s] - highest)
                        total += score[s]
                    out[:] = _ZERO
                    _add_rows(score, near, out)
                    _add_rows(score[near.shape[0] :], far_SK[:count], out)
                    for k in range(size):
                        out[k] = out[k] / total
                    _rotate(out, turns_NR[n], -_ONE)


@reduced
def _score(q_HK: Floats, rows_SK: Floats, scores_HS: Floats, at: int) -> None:
    for s in range(rows_SK.shape[0]):
        for h in range(q_HK.shape[0]):
            total = _ZERO
            for k in range(q_HK.shape[1]):
                total += q_HK[h, k] * rows_SK[s, k]
            scores_HS[h, at + s] = total


@reduced
def _add_rows(weights_S: Floats, rows_SK: Floats, out_K: Floats) -> None:
    """out += weights @ rows, eight rows at a time."""
    count, size = rows_SK.shape
    s = 0
    while s + 8 <= count:
        w, rows = weights_S[s : s + 8], rows_SK[s : s + 8]
        a, b, c, d, e, f, g, h = w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]
        for k in range(size):
            left = (a * rows[0, k] + b * rows[1, k]) + (c * rows[2, k] + d * rows[3, k])
            right = (e * rows[4, k] + f * rows[5, k]) + (g * rows[6, k] + h * rows[7, k])
            out_K[k] += left + right
        s += 8
    while s < count:
        for k in range(size):
            out_K[k] += weights_S[s] * rows_SK[s, k]
        s += 1


# --- compressed entries ------------------------------------------------------------------------------------------


@reduced
def compress(
    projected_NX: Floats,
    column: int,
    ape: Floats,
    norm_K: Floats,
    eps: np.float32,
    frequencies: Floats,
    rows_B1: Ints,
    positions_N: Ints,
    slots_B: Ints,
    values_SOX: Floats,
    scores_SOX: Floats,
    tables_BX: Ints,
    per_span: int,
    entries_SK: Stored,
    scales_S: Floats,
    fp4: bool,
) -> None:
    """Store each token's open row (values from column `column` of `projected`, then scores), and pool every window
    that it completes into an entry. `scales` are those of index keys in bytes, else it is empty. With `fp4`, entries
    are rounded as by `round_index`."""
    ratio, width = ape.shape
    kept, size = values_SOX.shape[1], norm_K.shape[0]
    series = width // size
    most, total, pooled = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.float32)
    turn, out = np.empty(2 * frequencies.shape[0], np.float32), np.empty_like(pooled)
    for b in range(slots_B.shape[0]):
        values, scores = values_SOX[slots_B[b]], scores_SOX[slots_B[b]]
        for n in range(rows_B1[b], rows_B1[b + 1]):
            position = positions_N[n]
            row = position % kept
            values[row] = projected_NX[n, column : column + width]
            for x in range(width):
                scores[row, x] = projected_NX[n, column + width + x] + ape[position % ratio, x]
            if (position + 1) % ratio:
                continue
            first = max(0, position + 1 - series * ratio)
            most[:] = _MINUS_INFINITY
            for token in range(first, position + 1):  # tokens of the previous window contribute their first half
                half = 0 if token <= position - ratio else width - size
                score = scores[token % kept, half : half + size]
                for k in range(size):
                    most[k] = score[k] if score[k] > most[k] else most[k]
            total[:], pooled[:] = _ZERO, _ZERO
            for token in range(first, position + 1):
                half = 0 if token <= position - ratio else width - size
                score = scores[token % kept, half : half + size]
                value = values[token % kept, half : half + size]
                for k in range(size):
                    mass = exp(score[k] - most[k])
                    total[k] += mass
                    pooled[k] += mass * value[k]
            for k in range(size):
                pooled[k] /= total[k]
            scale = _inverse_rms(pooled, eps)
            entry = position // ratio
            for k in range(size):
                out[k] = pooled[k] * scale * norm_K[k]
            _rotations_at(entry * ratio, frequencies, turn)
            _rotate(out, turn, _ONE)
            if fp4:
                _round_index(out)
            row = tables_BX[b, entry // per_span] * per_span + entry % per_span
            _store_row(out, entries_SK, row, per_span, turn.shape[0], scales_S)


# --- mixture of experts ------------------------------------------------------------------------------------------


@strict
def route(
    logits_NE: Floats, bias_E: Floats, scale: np.float32, chosen: bool, experts_NA: Ints, weights_NA: Floats
) -> None:
    """Compute the experts and weights of each token: affinities sqrt(softplus(logit)), scaled to sum to `scale`.

    Unless the experts were `chosen` before, take those with the highest affinity + bias; ties go to the lowest id.
    """
    experts, active = bias_E.shape[0], experts_NA.shape[1]
    affinity, ranks = np.empty(experts, np.float32), np.empty(experts, np.float32)
    for n in range(logits_NE.shape[0]):
        for e in range(experts):
            logit = logits_NE[n, e]
            affinity[e] = np.sqrt(logit if logit > 20.0 else np.float32(math.log1p(math.exp(logit))))
            ranks[e] = affinity[e] + bias_E[e]
        total = _ZERO
        for a in range(active):
            if not chosen:
                best = 0
                for e in range(1, experts):
                    best = e if ranks[e] > ranks[best] else best
                experts_NA[n, a] = best
                ranks[best] = _MINUS_INFINITY
            total += affinity[experts_NA[n, a]]
        for a in range(active):
            weights_NA[n, a] = affinity[experts_NA[n, a]] / total * scale


@strict
def swiglu(gate_up_NX: Floats, weights_N: Floats, limit: np.float32, first: int, last: int, out_NI: Floats) -> None:
    """silu(min(gate, limit)) * clamp(up, -limit, limit) * weight of the rows `first` to `last`; gate and up lie side by
    side."""
    width = out_NI.shape[1]
    for n in range(first, last):
        gate, up, out = gate_up_NX[n, :width], gate_up_NX[n, width:], out_NI[n]
        weight = weights_N[n]
        for i in range(width):
            g = limit if gate[i] > limit else gate[i]
            u = limit if up[i] > limit else up[i]
            u = -limit if u < -limit else u
            out[i] = g / (_ONE + exp(-g)) * u * weight


@strict
def mix_experts(
    x_ND: Floats,
    experts_NA: Ints,
    weights_NA: Floats,
    w13_EDX: Weights,
    w2_EID: Weights,
    limit: np.float32,
    shared_ND: Floats,
    out_ND: Floats,
) -> None:
    """Sum each token's weighted experts and the shared expert, for a few tokens, without copying weights."""
    active, width = experts_NA.shape[1], w2_EID.shape[1]
    gate_up, hidden = np.empty((1, 2 * width), np.float32), np.empty((1, width), np.float32)
    down = np.empty((1, out_ND.shape[1]), np.float32)
    for n in range(experts_NA.shape[0]):
        out = out_ND[n]
        for a in range(active):
            expert = experts_NA[n, a]
            multiply(x_ND[n : n + 1], w13_EDX[expert], 0, 2 * width, gate_up, 0)
            swiglu(gate_up, weights_NA[n, a : a + 1], limit, 0, 1, hidden)
            multiply(hidden, w2_EID[expert], 0, out.shape[0], down, 0)
            for d in range(out.shape[0]):
                out[d] = out[d] + down[0, d] if a else down[0, d]
        for d in range(out.shape[0]):
            out[d] += shared_ND[n, d]


@strict
def sort_by_expert(
    experts_NA: Ints, weights_NA: Floats, counts_E: Ints, rows_P: Ints, weights_P: Floats, places_NA: Ints
) -> None:
    """Sort the (token, expert) pairs by expert: each expert's number of pairs, the row and the weight of each place,
    and the place of each pair."""
    tokens, active = experts_NA.shape
    counts_E[:] = 0
    for n in range(tokens):
        for a in range(active):
            counts_E[experts_NA[n, a]] += 1
    ends = np.empty(counts_E.shape[0], np.int64)
    end = 0
    for e in range(counts_E.shape[0]):
        ends[e] = end
        end += counts_E[e]
    for n in range(tokens):
        for a in range(active):
            place = ends[experts_NA[n, a]]
            ends[experts_NA[n, a]] += 1
            rows_P[place], weights_P[place], places_NA[n, a] = n, weights_NA[n, a], place


@strict
def sum_experts(down: Floats, places_NA: Ints, shared_ND: Floats, out_ND: Floats) -> None:
    """Sum each token's experts, in the order of its choice, and then the shared one; the same sums as `mix_experts`."""
    for n in range(places_NA.shape[0]):
        out = out_ND[n]
        for a in range(places_NA.shape[1]):
            row = down[places_NA[n, a]]
            for d in range(out.shape[0]):
                out[d] = out[d] + row[d] if a else row[d]
        for d in range(out.shape[0]):
            out[d] += shared_ND[n, d]
