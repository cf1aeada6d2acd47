"""Fake quantization and its gradients written from their definitions, in numpy and float64.

Shares no line with the package. Arrays are `(rows, groups, n)`, scales `(rows, groups, 1)`. The
derivative by DSQ's `a` is taken by a complex step through the soft staircase, not by hand.
"""

from math import inf, pi, sqrt

import numpy as np

GRIDS = [("integer", b) for b in (2, 3, 4, 8)] + [("stretched", b) for b in (2, 3, 4, 8)]
GRIDS += [("ternary", 2), ("binary", 1)]
MASKS = ("range", "levels", "none")


def code_range(grid, bits):
    """q_min, q_max, z."""
    half = 2 ** (bits - 1)
    return {
        "integer": (-half, half - 1, 0.0),
        "stretched": (-half, half - 1, -0.5),
        "ternary": (-1, 1, 0.0),
        "binary": (-1, 0, -0.5),
    }[grid]


def gradient_range(grid, bits, mask):
    """Interval of v whose weights receive a gradient."""
    half = 2 ** (bits - 1)
    if mask == "none":
        return -inf, inf
    if mask == "levels":
        outer = {"integer": (-half, half - 1), "stretched": (0.5 - half, half - 0.5)}
        return {**outer, "ternary": (-1, 1), "binary": (-0.5, 0.5)}[grid]
    rule = {"integer": (-half, half - 1), "stretched": (-half, half)}
    return {**rule, "ternary": (-1.5, 1.5), "binary": (-0.5, 0.5)}[grid]


def codes(w, s, grid, bits):
    low, high, z = code_range(grid, bits)
    return np.clip(np.rint(w / s + z), low, high)


def value(w, s, grid, bits):
    return s * (codes(w, s, grid, bits) - code_range(grid, bits)[2])


def stableqat_g(u, amplitude, harmonics=1):
    m = np.arange(harmonics)
    waves = (-1.0) ** m / (2 * m + 1) * np.cos((2 * m + 1) * pi * np.asarray(u)[..., None])
    s = amplitude * sqrt(2) * pi * waves.sum(-1)
    return (1 - s) / (1 + s)


def dsq_g(u, a):
    k = np.log(2 / a - 1)
    t = np.abs(u) - 0.5  # distance to the nearest threshold; its sign does not matter here
    return 0.5 / (1 - a) * k / np.cosh(k * t) ** 2


def dsq_value_by_a(u, a):
    """d/da of the soft staircase (in steps) at distance `u` from the nearest level."""
    t = u - np.where(u >= 0, 0.5, -0.5)
    step = 1e-30
    complex_a = np.asarray(a, dtype=np.complex128) + 1j * step
    phi = np.tanh(np.log(2 / complex_a - 1) * t) / (1 - complex_a)
    return phi.imag / step / 2


def gradients(upstream, w, s, grid, bits, mask, g, a=None):
    """Gradients of weight, scale and the logit of DSQ's `a` (None where `a` is None); `g` maps u to g(u)."""
    low, high, z = code_range(grid, bits)
    v = w / s
    u = v + z - np.rint(v + z)
    bottom, top = gradient_range(grid, bits, mask)
    inside = (bottom <= v) & (v <= top)
    grad_scale = 1 / np.sqrt(w.shape[-1] * max(high, 1))

    by_weight = upstream * inside * g(u)
    if grid == "binary":
        by_scale = np.sign(v) / 2
    else:
        by_scale = np.where(inside, codes(w, s, grid, bits) - z - v, np.where(v < 0, low - z, high - z))
    by_scale = (upstream * by_scale).sum(-1, keepdims=True) * grad_scale
    if a is None:
        return by_weight, by_scale, None
    by_logit = upstream * inside * s * dsq_value_by_a(u, a) * a * (1 - a)
    return by_weight, by_scale, by_logit.sum(-1, keepdims=True) * grad_scale
