"""Matrix products on a CPU, straight from packed weights, for any number of rows.

out = x · wᵀ. Every output is one chain of fused multiply-adds over all inputs, in their order, so a row's bits do not
depend on the other rows, on the split into threads, or on the format: codes are widened to float32 in registers, with
the bits that a dequantised weight would have.

A weight's outputs are cut into panels of `LANES`, which lie one after the other in memory. Within a panel the inputs
are the rows, so one vector load reads the weights of one input and `LANES` outputs, and a panel is read as one stream.
For few rows a widened weight is used at once and forgotten: reading memory and widening are all that costs. For many
rows, a tile of `TILE` inputs is widened into the first-level cache, and every six rows of a block pass over it with
their sums in registers, like the kernel of a BLAS (Goto and van de Geijn 2008, "Anatomy of high-performance matrix
multiplication"). The vectors are explicit, because a compiler does not keep loop-carried sums of a panel in registers.

float32 and bfloat16 weights may also lie inputs first, [K, X], as strided views of `LANES` columns each; a model's
parameters can be views of such memory. It must go on for `LANES` elements, because the last panel is read whole.

Dimension key: N rows, K inputs, X outputs, P panels, L lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, overload, register_model
from numpy.typing import NDArray

from agentkit_kernels.cpu.loops import (
    _ALL_BUT_SIGN,
    _INFINITY,
    _MINUS_INFINITY,
    _ZERO,
    E4M3,
    Floats,
    Halves,
    Ints,
    Ints32,
    Stored,
    _lines,
    strict,
)

LANES = 64 if binding.get_host_cpu_features().get("avx512f") else 16
"""Outputs per panel: four vector registers on AVX-512, NEON, and two on AVX2, where there are fewer registers."""
TILE = 128
"""Inputs that are widened together: 32 KiB with 64 lanes."""
AHEAD = 4096
"""Distance in bytes at which a stream of codes is prefetched: the processor does not by itself use a memory's full
rate."""
ROW_BLOCK = 96
"""Rows that use a tile before the next is widened; their inputs stay in the second-level cache."""
GROUP = 32
"""Consecutive inputs from a multiple of this share a scale in every format."""

Bytes = NDArray[np.uint8]
Scales = Bytes | Floats
"""E8M0 bytes (byte b is 2^(b - 127)) or float32."""


class FP8(NamedTuple):
    """E4M3 codes [P, K, L], and scales [P, ceil(K / 128), L]."""

    codes: Bytes
    scales: Scales


class FP4(NamedTuple):
    """E2M1 codes [P, K / 2, L], with the even input in the low half of a byte, and scales [P, K / 32, L]."""

    codes: Bytes
    scales: Scales


class Int8(NamedTuple):
    """Integers [P, K, L], and a scale per output [P, 1, L]."""

    codes: NDArray[np.int8]
    scales: Floats


class BF16(NamedTuple):
    """The upper halves of float32 values, [P, K, L]."""

    codes: Halves


class F32(NamedTuple):
    """Values [P, K, L]."""

    codes: Floats


Panels = FP8 | FP4 | Int8 | BF16 | F32


# --- vectors -----------------------------------------------------------------------------------------------------


class _Lanes(types.Type):
    """A vector of `LANES` float32 values."""

    def __init__(self) -> None:
        super().__init__(name=f"Lanes({LANES})")


_lanes = _Lanes()
_FLOAT, _HALF, _BYTE, _SHORT, _INT = ir.FloatType(), ir.HalfType(), ir.IntType(8), ir.IntType(16), ir.IntType(32)
_FUSED = ("contract",)


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, lanes: Any) -> None:
        super().__init__(manager, lanes, _vector(_FLOAT))  # type: ignore[no-untyped-call]


def _vectors(function: Callable[..., Any]) -> Any:
    """Define a function of compiled code by the instructions that it becomes."""
    return intrinsic(function)


def _vector(element: Any) -> Any:
    return ir.VectorType(element, LANES)


def _constant(element: Any, value: float) -> Any:
    return ir.Constant(_vector(element), [value] * LANES)


def _spread(builder: Any, value: Any) -> Any:
    undefined = ir.Constant(_vector(value.type), ir.Undefined)
    first = builder.insert_element(undefined, value, _INT(0))
    return builder.shuffle_vector(first, undefined, _constant(_INT, 0))


def _place(context: Any, builder: Any, array_type: Any, array: Any, indices: Sequence[Any], item: Any) -> Any:
    """Return a pointer of type `item` to an element of an array."""
    held = context.make_array(array_type)(context, builder, array)
    place = cgutils.get_item_pointer(context, builder, array_type, held, indices)  # type: ignore[no-untyped-call]
    return builder.bitcast(place, item.as_pointer())


def _read(context: Any, builder: Any, array_type: Any, array: Any, indices: Sequence[Any], item: Any) -> Any:
    """Load an item of `indices`, aligned like an element."""
    value = builder.load(_place(context, builder, array_type, array, indices, item))
    value.align = context.get_abi_sizeof(context.get_data_type(array_type.dtype))
    return value


def _loader(widen: Callable[[Any, Any], Any], stored: Any) -> Any:
    """Return an intrinsic (codes [P, K, L], panel, row) that loads a vector of `stored` and widens it."""

    @_vectors
    def load(typing: Any, codes: Any, panel: Any, row: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            indices = (*args[1:], args[1].type(0))
            return widen(builder, _read(context, builder, signature.args[0], args[0], indices, _vector(stored)))

        return _lanes(codes, types.intp, types.intp), generate

    return load


def _widen_fp8(builder: Any, codes: Any) -> Any:
    """E4M3 is a float16 of which three exponent and seven mantissa bits are missing; the value is 2^8 times it."""
    bits = builder.shl(builder.sext(codes, _vector(_SHORT)), _constant(_SHORT, 7))
    return _from_half(builder, builder.and_(bits, _constant(_SHORT, 0xBF80)))


def _widen_fp4(low: bool) -> Callable[[Any, Any], Any]:
    """E2M1 is a float16 of which three exponent and nine mantissa bits are missing; the value is 2^14 times it."""

    def widen(builder: Any, codes: Any) -> Any:
        codes = builder.zext(codes, _vector(_SHORT))
        sign, rest = (12, 9) if low else (8, 5)
        sign = builder.and_(builder.shl(codes, _constant(_SHORT, sign)), _constant(_SHORT, 0x8000))
        rest = builder.and_(builder.shl(codes, _constant(_SHORT, rest)), _constant(_SHORT, 0x0E00))
        return _from_half(builder, builder.or_(sign, rest))

    return widen


def _from_half(builder: Any, bits: Any) -> Any:
    return builder.fpext(builder.bitcast(bits, _vector(_HALF)), _vector(_FLOAT))


def _widen_int8(builder: Any, codes: Any) -> Any:
    return builder.sitofp(builder.sext(codes, _vector(_INT)), _vector(_FLOAT))


def _widen_bf16(builder: Any, codes: Any) -> Any:
    bits = builder.shl(builder.zext(codes, _vector(_INT)), _constant(_INT, 16))
    return builder.bitcast(bits, _vector(_FLOAT))


def _power(exponent: int) -> Callable[[Any, Any], Any]:
    """Widen E8M0 bytes to powers of two, times 2^exponent, which makes up for `_widen_fp8` and `_widen_fp4`."""

    def widen(builder: Any, codes: Any) -> Any:
        codes = builder.add(builder.zext(codes, _vector(_INT)), _constant(_INT, exponent))
        return builder.bitcast(builder.shl(codes, _constant(_INT, 23)), _vector(_FLOAT))

    return widen


def _product(exponent: int) -> Callable[[Any, Any], Any]:
    return lambda builder, values: builder.fmul(values, _constant(_FLOAT, 2.0**exponent))


_load_fp8, _load_int8 = _loader(_widen_fp8, _BYTE), _loader(_widen_int8, _BYTE)
_load_low, _load_high = _loader(_widen_fp4(low=True), _BYTE), _loader(_widen_fp4(low=False), _BYTE)
_load_bf16, _load_f32 = _loader(_widen_bf16, _SHORT), _loader(lambda builder, values: values, _FLOAT)
_powers = {8: _loader(_power(8), _BYTE), 14: _loader(_power(14), _BYTE)}
_products = {8: _loader(_product(8), _FLOAT), 14: _loader(_product(14), _FLOAT)}


@_vectors
def _zeros(typing: Any) -> Any:
    return _lanes(), lambda context, builder, signature, args: _constant(_FLOAT, 0.0)


@_vectors
def _scaled(typing: Any, values: Any, scales: Any) -> Any:
    return _lanes(_lanes, _lanes), lambda context, builder, signature, args: builder.fmul(*args)


@_vectors
def _keep(typing: Any, tile: Any, row: Any, values: Any) -> Any:
    """Store a vector in a row of a tile [TILE, L]."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = (args[1], args[1].type(0))
        builder.store(args[2], _place(context, builder, signature.args[0], args[0], place, _vector(_FLOAT))).align = 4
        return context.get_dummy_value()

    return types.void(tile, types.intp, _lanes), generate


@_vectors
def _kept(typing: Any, tile: Any, row: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _read(context, builder, signature.args[0], args[0], (args[1], args[1].type(0)), _vector(_FLOAT))

    return _lanes(tile, types.intp), generate


@_vectors
def _sums_of(typing: Any, out: Any, row: Any, column: Any, like: Any) -> Any:
    """Load the sums of as many rows as there are vectors in the tuple `like`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows = [builder.add(args[1], args[1].type(n)) for n in range(signature.return_type.count)]
        item = _vector(_FLOAT)
        sums = [_read(context, builder, signature.args[0], args[0], (row, args[2]), item) for row in rows]
        return context.make_tuple(builder, signature.return_type, sums)

    return like(out, types.intp, types.intp, like), generate


@_vectors
def _keep_sums(typing: Any, out: Any, row: Any, column: Any, sums: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for n in range(signature.args[3].count):
            indices = (builder.add(args[1], args[1].type(n)), args[2])
            place = _place(context, builder, signature.args[0], args[0], indices, _vector(_FLOAT))
            builder.store(builder.extract_value(args[3], n), place).align = 4
        return context.get_dummy_value()

    return types.void(out, types.intp, types.intp, sums), generate


@_vectors
def _add(typing: Any, x: Any, row: Any, k: Any, weights: Any, sums: Any) -> Any:
    """sums[n] + x[row + n, k] * weights, fused where the processor can."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, row, k, weights, sums = args
        added = []
        for n in range(signature.return_type.count):
            value = _read(context, builder, signature.args[0], x, (builder.add(row, row.type(n)), k), _FLOAT)
            product = builder.fmul(_spread(builder, value), weights, flags=_FUSED)
            added.append(builder.fadd(product, builder.extract_value(sums, n), flags=_FUSED))
        return context.make_tuple(builder, signature.return_type, added)

    return sums(x, types.intp, types.intp, _lanes, sums), generate


@_vectors
def _prefetch(typing: Any, codes: Any, panel: Any, row: Any) -> Any:
    """Ask for the cache lines of a row of codes [P, K, L], which may lie behind the last."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = _place(context, builder, signature.args[0], args[0], (*args[1:], args[1].type(0)), _BYTE)
        kind = ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _INT, _INT, _INT])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")  # type: ignore[no-untyped-call]
        size = LANES * context.get_abi_sizeof(context.get_data_type(signature.args[0].dtype))
        for line in range(0, size, 64):
            builder.call(prefetch, [builder.gep(place, [_INT(line)]), _INT(0), _INT(3), _INT(1)])
        return context.get_dummy_value()

    return types.void(codes, types.intp, types.intp), generate


# --- formats -----------------------------------------------------------------------------------------------------


def _scale(weight: Any, panel: int, k: int) -> Any:
    """Return the scales of one panel for the `GROUP` inputs from k."""
    raise NotImplementedError("exists in kernels only, for each format")


def _weights(weight: Any, panel: int, k: int, scale: Any) -> Any:
    """Return the weights of one panel for input k."""
    raise NotImplementedError("exists in kernels only, for each format")


@overload(_scale, inline="always")
def _scale_of(weight: Any, panel: Any, k: Any) -> Any:
    kind = weight.instance_class
    shift, exponent = (7, 8) if kind is FP8 else (5, 14)
    load = (_powers if kind in (FP8, FP4) and weight[1].dtype == types.uint8 else _products)[exponent]

    def none(weight: Any, panel: Any, k: Any) -> Any:
        return _zeros()

    def of_outputs(weight: Any, panel: Any, k: Any) -> Any:
        return _load_f32(weight.scales, panel, 0)

    def of_blocks(weight: Any, panel: Any, k: Any) -> Any:
        return load(weight.scales, panel, k >> shift)

    return none if kind in (BF16, F32) else of_outputs if kind is Int8 else of_blocks


@overload(_weights, inline="always")
def _weights_of(weight: Any, panel: Any, k: Any, scale: Any) -> Any:
    kind = weight.instance_class
    load = {FP8: _load_fp8, FP4: None, Int8: _load_int8, BF16: _load_bf16, F32: _load_f32}[kind]

    def plain(weight: Any, panel: Any, k: Any, scale: Any) -> Any:
        return load(weight.codes, panel, k)

    def scaled(weight: Any, panel: Any, k: Any, scale: Any) -> Any:
        return _scaled(load(weight.codes, panel, k), scale)

    def pairs(weight: Any, panel: Any, k: Any, scale: Any) -> Any:
        values = _load_high(weight.codes, panel, k >> 1) if k & 1 else _load_low(weight.codes, panel, k >> 1)
        return _scaled(values, scale)

    return plain if kind in (BF16, F32) else pairs if kind is FP4 else scaled


# --- packing -----------------------------------------------------------------------------------------------------


@strict
def lay_out(rows_XK: Any, panels_PKL: Any, first: int) -> None:
    """Copy rows to the outputs from `first` on: codes [X, K] of any dtype, or scales."""
    outputs, inputs = rows_XK.shape
    x = 0
    while x < outputs:
        panel, lane = divmod(first + x, LANES)
        count = min(LANES - lane, outputs - x)
        for low in range(0, inputs, 64):  # the lines of 64 inputs stay in the cache until they are full
            high = min(low + 64, inputs)
            for i in range(count):
                for k in range(low, high):
                    panels_PKL[panel, k, lane + i] = rows_XK[x + i, k]
        x += count


# --- products ----------------------------------------------------------------------------------------------------


@strict
def multiply(x_NK: Floats, weight: Panels, outputs: int, first: int, last: int, out_NX: Floats, column: int) -> None:
    """out = x · wᵀ for the panels `first` to `last` of a weight with `outputs` outputs.

    `column` is the column of `out` that takes the weight's first output.
    """
    tile = _lines(TILE, LANES)
    spare_NL = np.empty((x_NK.shape[0] if outputs % LANES else 0, LANES), np.float32)
    for low in range(0, x_NK.shape[0], ROW_BLOCK):
        high = min(low + ROW_BLOCK, x_NK.shape[0])
        for panel in range(first, last):
            begin = panel * LANES
            whole = begin + LANES <= outputs
            place = column + begin if whole else 0
            _multiply_panel(x_NK, low, high, weight, panel, tile, out_NX if whole else spare_NL, place)
            if not whole:
                for n in range(low, high):
                    for x in range(outputs - begin):
                        out_NX[n, column + begin + x] = spare_NL[n, x]


@strict
def _multiply_panel(
    x_NK: Floats, low: int, high: int, weight: Panels, panel: int, tile: Floats, out_NX: Floats, column: int
) -> None:
    zero = _zeros()
    one, two, four = (zero,), (zero, zero), (zero, zero, zero, zero)
    n = low
    if high - low <= 4:
        if n + 4 <= high:
            _multiply_widening(x_NK, n, weight, panel, out_NX, column, four)
            n += 4
        if n + 2 <= high:
            _multiply_widening(x_NK, n, weight, panel, out_NX, column, two)
            n += 2
        if n < high:
            _multiply_widening(x_NK, n, weight, panel, out_NX, column, one)
        return
    inputs, shift = x_NK.shape[1], 1 if weight.codes.shape[1] < x_NK.shape[1] else 0
    for first in range(0, inputs, TILE):
        last = min(first + TILE, inputs)
        for start in range(first, last, GROUP):
            scale = _scale(weight, panel, start)
            for k in range(start, min(start + GROUP, last)):
                _prefetch(weight.codes, panel, (k + TILE) >> shift)
                _keep(tile, k - first, _weights(weight, panel, k, scale))
        _multiply_rows(x_NK, low, high, first, last, tile, out_NX, column)


@strict
def _multiply_rows(
    x_NK: Floats, low: int, high: int, first: int, last: int, tile: Floats, out_NX: Floats, column: int
) -> None:
    """Continue the sums of the rows `low` to `high` with the inputs of one tile, `first` to `last`."""
    zero = _zeros()
    n = low
    while n + 6 <= high:
        _multiply_tile(x_NK, n, first, last, tile, out_NX, column, (zero, zero, zero, zero, zero, zero))
        n += 6
    if n + 4 <= high:
        _multiply_tile(x_NK, n, first, last, tile, out_NX, column, (zero, zero, zero, zero))
        n += 4
    if n + 2 <= high:
        _multiply_tile(x_NK, n, first, last, tile, out_NX, column, (zero, zero))
        n += 2
    if n < high:
        _multiply_tile(x_NK, n, first, last, tile, out_NX, column, (zero,))


@strict
def _multiply_widening(
    x_NK: Floats, row: int, weight: Panels, panel: int, out_NX: Floats, column: int, sums: Any
) -> None:
    """Multiply as many rows as `sums` has vectors."""
    inputs, shift = x_NK.shape[1], 1 if weight.codes.shape[1] < x_NK.shape[1] else 0
    ahead = AHEAD // (LANES * weight.codes.itemsize)
    for start in range(0, inputs, GROUP):
        scale = _scale(weight, panel, start)
        for k in range(start, min(start + GROUP, inputs)):
            _prefetch(weight.codes, panel, (k >> shift) + ahead)
            sums = _add(x_NK, row, k, _weights(weight, panel, k, scale), sums)
    _keep_sums(out_NX, row, column, sums)


@strict
def _multiply_tile(
    x_NK: Floats, row: int, first: int, last: int, tile: Floats, out_NX: Floats, column: int, sums: Any
) -> None:
    """Continue the sums of as many rows as `sums` has vectors, with the inputs of one tile."""
    if first:
        sums = _sums_of(out_NX, row, column, sums)
    for k in range(first, last):
        sums = _add(x_NK, row, k, _kept(tile, k - first), sums)
    _keep_sums(out_NX, row, column, sums)


# --- index scores ------------------------------------------------------------------------------------------------


def _load_key(entries_SC: Stored, scales_S: Floats, row: int, tile: Floats, column: int) -> None:
    """Write a key into a column of a tile, in float32."""
    raise NotImplementedError("exists in kernels only, for each type of keys")


@overload(_load_key, inline="always")
def _load_key_as(entries_SC: Any, scales_S: Any, row: Any, tile: Any, column: Any) -> Any:
    def as_it_is(entries_SC: Any, scales_S: Any, row: Any, tile: Any, column: Any) -> None:
        for c in range(entries_SC.shape[1]):
            tile[c, column] = entries_SC[row, c]

    def from_codes(entries_SC: Any, scales_S: Any, row: Any, tile: Any, column: Any) -> None:
        for c in range(entries_SC.shape[1]):
            tile[c, column] = E4M3[entries_SC[row, c]] * scales_S[row]

    return as_it_is if isinstance(entries_SC.dtype, types.Float) else from_codes


@strict
def choose(
    q_NJC: Floats,
    weights_NJ: Floats,
    rows_B1: Ints,
    visible_N: Ints,
    tables_BX: Ints,
    per_span: int,
    entries_SC: Stored,
    scales_S: Floats,
    top_k: int,
    first: int,
    last: int,
    picks_NP: Ints,
    counts_N: Ints,
) -> None:
    """Choose the entries of the queries `first` to `last`, in increasing order, and count them.

    The score of an entry is sum_j weight_j * relu(q_j · key). Scores above the lowest of a query's candidates are
    appended to these, which are cut to the best `top_k` when there are twice as many. `picks` needs room for
    `2 * top_k + LANES` columns. `scales` are those of keys in bytes.
    """
    num_heads, size = q_NJC.shape[1:]
    tile, dots, scores = _lines(size, LANES), _lines(num_heads, LANES), np.empty(LANES, np.float32)
    best_NP = np.empty((last - first, picks_NP.shape[1]), np.float32)
    least_N, ranks = np.full(last - first, _MINUS_INFINITY, np.float32), np.empty(picks_NP.shape[1], np.int32)
    for b in range(tables_BX.shape[0]):
        low, high = max(first, rows_B1[b]), min(last, rows_B1[b + 1])
        if low >= high:
            continue
        if visible_N[high - 1] <= top_k:
            for n in range(low, high):
                counts_N[n] = visible_N[n]
                for s in range(visible_N[n]):
                    picks_NP[n, s] = s
            continue
        counts_N[low:high] = 0
        for entry in range(0, visible_N[high - 1], LANES):
            for s in range(entry, min(entry + LANES, visible_N[high - 1])):
                row = tables_BX[b, s // per_span] * per_span + s % per_span
                _load_key(entries_SC, scales_S, row, tile, s - entry)
            for n in range(low, high):
                seen = min(LANES, visible_N[n] - entry)
                if seen <= 0:
                    continue
                _multiply_rows(q_NJC[n], 0, num_heads, 0, size, tile, dots, 0)
                scores[:] = _ZERO
                for j in range(num_heads):
                    weight = weights_NJ[n, j]
                    for s in range(LANES):
                        scores[s] += weight * (_ZERO if dots[j, s] < _ZERO else dots[j, s])
                best, picks, least = best_NP[n - first], picks_NP[n], least_N[n - first]
                better, count = 0, counts_N[n]
                for s in range(seen):  # NaN is chosen, so that the logits show it
                    scores[s] = scores[s] if scores[s] == scores[s] else _INFINITY
                    better += 1 if scores[s] > least else 0
                if not better:
                    continue
                for s in range(seen):  # no branch: the next candidate overwrites a score that is too low
                    best[count], picks[count] = scores[s], entry + s
                    count += 1 if scores[s] > least else 0
                if count > 2 * top_k:
                    least_N[n - first] = _keep_best(best, picks, count, top_k, ranks)
                    count = top_k
                counts_N[n] = count
        for n in range(low, high):
            if counts_N[n] > top_k:
                _keep_best(best_NP[n - first], picks_NP[n], counts_N[n], top_k, ranks)
                counts_N[n] = top_k


@strict
def _keep_best(best: Floats, picks: Ints, count: int, top_k: int, ranks: Ints32) -> np.float32:
    """Cut candidates to the best `top_k` in their order, the first among equals; return the lowest score kept."""
    least = _largest(best, count, top_k - 1, ranks)
    equals = top_k
    for s in range(count):
        equals -= 1 if best[s] > least else 0
    kept = 0
    for s in range(count):
        if best[s] > least or (best[s] == least and equals > 0):
            equals -= 1 if best[s] == least else 0
            best[kept], picks[kept] = best[s], picks[s]
            kept += 1
    return least


@strict
def _largest(best: Floats, count: int, rank: int, ranks: Ints32) -> np.float32:
    """Return the value of the given rank, found bit by bit: read as integers, floats keep their order."""
    for s in range(count):
        bits = np.float32(best[s]).view(np.int32)
        ranks[s] = bits ^ ((bits >> np.int32(31)) & _ALL_BUT_SIGN)
    found = -(1 << 31)
    for bit in range(31, -1, -1):
        tried, above = np.int32(found + (1 << bit)), np.int32(0)
        for s in range(count):
            above += np.int32(ranks[s] >= tried)
        if above > rank:
            found += 1 << bit
    bits = np.int32(found)
    value: np.float32 = np.int32(bits ^ ((bits >> np.int32(31)) & _ALL_BUT_SIGN)).view(np.float32)
    return value
