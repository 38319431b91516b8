"""Device functions that several kernels share.

Everything here runs on a GPU and in Triton's interpreter alike, so no libdevice and no inline
assembly: tanh is written out.
"""

import triton
import triton.language as tl

from lm2_kernels.backends import dropout

_MULTIPLIER_1 = tl.constexpr(dropout.MULTIPLIER_1)
_MULTIPLIER_2 = tl.constexpr(dropout.MULTIPLIER_2)
_GOLDEN = tl.constexpr(dropout.GOLDEN)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def sigmoid_and_slope(x):
    """Return sigmoid(x) and its derivative, without the cancellation of 1 - sigmoid near 1."""
    decay = tl.exp(-x)
    s = 1.0 / (1.0 + decay)
    # decay * s is 1 - s; the side not taken may be inf * 0
    smaller = tl.where(x < 0.0, s, decay * s)
    return s, smaller * (1.0 - smaller)


@triton.jit
def tanh(x):
    """Tanh of a float32 block, relative error below 2e-7 everywhere.

    1 - 2 / (exp(2|x|) + 1) loses its digits near 0, where x + x^3 P(x^2) takes over. P is our
    minimax fit on |x| <= 0.625 (relative error of the fit 4.4e-9).
    """
    square = x * x
    poly = -0.005704987328499556
    poly = poly * square + 0.0206390880048275
    poly = poly * square - 0.05373971536755562
    poly = poly * square + 0.13331441581249237
    poly = poly * square - 0.3333328068256378
    near = x + x * square * poly
    # exp overflows to inf for large |x|, which gives exactly 1
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    far = tl.where(x < 0.0, -far, far)
    return tl.where(tl.abs(x) < 0.625, near, far)


@triton.jit
def _multiply(x, factor: tl.constexpr):
    # modulo 2^32 by intention: the interpreter's overflow check must not see it
    return tl.mul(x, tl.full([], factor, tl.uint32), sanitize_overflow=False)


@triton.jit
def _half(x):
    x = _multiply(x ^ (x >> 16), _MULTIPLIER_1)
    return x ^ (x >> 15)


@triton.jit
def mix(x):
    x = _multiply(_half(x), _MULTIPLIER_2)
    return x ^ (x >> 16)


@triton.jit
def dropout_row_keys(seed, rows):
    """The two 32-bit keys of each row of scores (see lm2_kernels.backends.dropout).

    seed: int64 scalar; rows: int64 block of (b * H + h) * T + t.
    """
    key = mix(mix(seed.to(tl.uint32)) ^ (seed >> 32).to(tl.uint32))
    high = mix(key ^ (rows >> 32).to(tl.uint32))
    key_a = mix(tl.add(high, rows.to(tl.uint32), sanitize_overflow=False))
    return key_a, mix(key_a ^ key)


@triton.jit
def dropout_keep(key_a, key_b, slots, threshold):
    """Which elements stay; the keys, the slots and the threshold broadcast against each other."""
    position = _multiply(slots.to(tl.uint32), _GOLDEN)
    bits = mix(tl.add(_half(position ^ key_a), key_b, sanitize_overflow=False))
    return bits >= threshold.to(tl.uint32)
