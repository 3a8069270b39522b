"""Decode the 8-bit and 4-bit formats of checkpoints and caches inside Triton kernels, with bit operations alone.

* `e4m3_to_float`: FP8 E4M3 (1 sign, 4 exponent, 3 mantissa bits, bias 7, at most 448, no infinity; 0x7F and 0xFF are
  NaN).
* `e2m1_to_float`: FP4 E2M1 (1 sign, 2 exponent, 1 mantissa bits, bias 1): 0, 0.5, 1, 1.5, 2, 3, 4, 6 and negatives.
* `e8m0_to_float`: a power-of-two scale 2^(code - 127); 255 is NaN.
* `mxfp4_to_float`: E2M1 codes, eight in a 32-bit word, with a scale per 32 values.

Targets disagree on native types: sm_80 has no FP8 conversion, and gfx942's FP8 has another exponent bias. Bytes decode
alike on all of them. An E4M3 or E2M1 code, shifted into place, is a float16 that is too small by a power of two;
float16 keeps its subnormals everywhere, while float32 arithmetic may flush them to zero.

An E4M3 or E2M1 value times a power of two is exact in bfloat16, if it is in range.
Source: OCP 8-bit Floating Point Specification 1.0; OCP Microscaling Formats 1.0. Twin: `reference/formats.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def e4m3_to_float(code):
    """Return float32 from E4M3 codes (uint8), of any shape."""
    bits = code.to(tl.int16)
    half = ((bits & 0x7F) << 7 | (bits & 0x80) << 8).to(tl.float16, bitcast=True)  # too small by 2^(15 - 7)
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)


@triton.jit
def e2m1_to_float(code):
    """Return float32 from the low four bits of E2M1 codes (uint8), of any shape."""
    bits = code.to(tl.int16)
    half = ((bits & 0x7) << 9 | (bits & 0x8) << 12).to(tl.float16, bitcast=True)  # too small by 2^(15 - 1)
    return half.to(tl.float32) * 16384.0


@triton.jit
def e8m0_to_float(code):
    """Return float32 powers of two from E8M0 codes (uint8), of any shape."""
    exponent = code.to(tl.int32)
    bits = tl.where(exponent == 0, 0x00400000, exponent << 23)  # 2^-127 is subnormal
    return tl.where(exponent == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def scale_to_float(scale):
    """Return float32 from scales that are E8M0 codes (uint8) or floats."""
    if scale.dtype == tl.uint8:
        return e8m0_to_float(scale)
    return scale.to(tl.float32)


@triton.jit
def mxfp4_to_float(words, scales, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Return float32 [ROWS, 8 * WORDS] from words (int32 [ROWS, WORDS]) and scales ([ROWS, WORDS // 4]).

    A word's lowest four bits are its first code. Codes j and j + 4 are 16 bits apart, so that one shift and one mask
    decode both: about half the instructions of decoding them one by one.
    """
    v0, v4 = _e2m1_pair(words)
    v1, v5 = _e2m1_pair(words >> 4)
    v2, v6 = _e2m1_pair(words >> 8)
    v3, v7 = _e2m1_pair(words >> 12)
    # Each join adds a last dimension of 2, so the innermost one becomes the highest bit of the position in a word.
    even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
    odd = tl.join(tl.join(v1, v5), tl.join(v3, v7))
    groups = tl.reshape(tl.join(even, odd), (ROWS, WORDS // 4, 32)).to(tl.float32)
    factors = scale_to_float(scales) * 16384.0
    return tl.reshape(groups * factors[:, :, None], (ROWS, 8 * WORDS))


@triton.jit
def _e2m1_pair(words):
    halves = (words & 0x00070007) << 9 | (words & 0x00080008) << 12
    low = halves.to(tl.int16).to(tl.float16, bitcast=True)
    return low, (halves >> 16).to(tl.int16).to(tl.float16, bitcast=True)
