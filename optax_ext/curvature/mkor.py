r"""MKOR: Kronecker-factored curvature whose inverse factors move by rank-1 updates.

K-FAC preconditions a layer's gradient [in, out] from both sides, with the inverses of
the second moments of its inputs and of its outputs' gradients. MKOR keeps the inverses
themselves: when a mean input a arrives, the inverse of F + a a^T follows from that of F
by Sherman and Morrison's formula, without any factorisation.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import (
    check_choice,
    check_hyperparam,
    check_interval,
    check_rate,
)
from optax_ext._core.extra_args import require
from optax_ext._core.geometry import length
from optax_ext._core.leaves import next_count
from optax_ext._core.matrices import as_matrix, matrix_shape
from optax_ext._core.trees import computing_dtype
from optax_ext.curvature._paths import LeavesByPath, Path, path_name


class MKORFactors(NamedTuple):
    """Inverse factors of a layer, of its input side and of its output side."""

    inputs: jax.Array
    outputs: jax.Array


class MKORState(NamedTuple):
    """State of `scale_by_mkor`: a count, and factors by name of layer."""

    count: jax.Array
    factors: dict[str, MKORFactors]


def _rank_one(m: jax.Array, v: jax.Array, a: Any, b: Any) -> jax.Array:
    r"""The matrix :math:`M - b M v v^T M / (a + b v^T M v)`, however long v is."""
    size = length(v)
    size = jnp.where(size > 0, size, 1)
    w = m @ (v / size)
    below = a / size / size + b * (v / size) @ w
    # Rounding may leave nothing of M along v; then there is nothing to take away.
    return m - jnp.where(below > 0, b / jnp.where(below > 0, below, 1), 0) * (
        w[:, None] * w[None, :]
    )


def _reference(m: jax.Array, v: jax.Array, gamma: Any) -> jax.Array:
    eye = jnp.eye(len(m), dtype=m.dtype)
    return _rank_one(gamma * m + (1 - gamma) * eye, v, 1.0, 1.0)


def _exact(
    m: jax.Array, v: jax.Array, gamma: Any, threshold: Any, zeta: Any
) -> jax.Array:
    eye = jnp.eye(len(m), dtype=m.dtype)
    large = jnp.max(jnp.abs(m)) > threshold
    m = jnp.where(large, zeta * m + (1 - zeta) * eye, m)
    return _rank_one(m, v, gamma, 1 - gamma) / gamma


def _rescaled(u: jax.Array, g: jax.Array, fan_in: int) -> jax.Array:
    """The update with the gradient's length, lengths of kernel and bias added up."""
    want = length(g[:fan_in]) + length(g[fan_in:])
    size = length(u[:fan_in]) + length(u[fan_in:])
    return u / jnp.where(size > 0, size, 1) * want


def _statistics(
    name: str, extra: dict[str, Any], bias: Any, clip: Any, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Mean input (with 1 for the bias), and mean gradient of the output, of a layer."""
    a = require("scale_by_mkor", extra, "activations").get(name)
    if a is None:
        raise ValueError(
            f"scale_by_mkor: the extra argument activations lacks {name!r}"
        )
    a = a.astype(dtype)
    if a.ndim > 1:
        a = jnp.mean(jnp.clip(a, -clip, clip).reshape(-1, a.shape[-1]), axis=0)
    s = (extra.get("preact_grads") or {}).get(name, bias)
    if s is None:
        raise ValueError(
            f"scale_by_mkor: layer {name!r} has no bias, so it needs its entry in the "
            "extra argument preact_grads"
        )
    s = s.astype(dtype)
    s = jnp.sum(s.reshape(-1, s.shape[-1]), axis=0)
    one = [] if bias is None else [jnp.ones(1, dtype)]
    return jnp.concatenate([a, *one]), s


@catalogued(
    title="MKOR: Momentum-Enabled Kronecker-Factor-Based Optimizer Using Rank-1 "
    "Updates",
    arxiv="2306.01685",
    kind="link",
    needs=("activations",),
    state="2 matrices a layer, [in, in] and [out, out]",
    slots=0,
    variant="the released code ('reference'), or the true inverse ('exact'); the "
    "paper's formula is the inverse of nothing, with either sign.",
    compared="goldens mkor_reference, mkor_exact; numpy.linalg.inv",
    example=lambda: {"layers": {}},
)
def scale_by_mkor(
    layers: Mapping[str, tuple[Path, Path | None]],
    gamma: float = 0.95,
    update_interval: int = 10,
    clip: float = 100.0,
    variant: str = "reference",
    stabilization_threshold: float = 2.0,
    zeta: float = 0.9,
) -> optax.GradientTransformationExtraArgs:
    r"""Precondition layers from both sides, with inverses that rank-1 updates move.

    With G the gradient [in, out] of a kernel, that of the bias as a last row, a the
    mean input (1 appended for the bias) and s the mean gradient of the output:

    .. math::
      \text{reference}: \quad M' = \gamma M + (1 - \gamma) I, \quad
      M \leftarrow M' - \frac{M' v v^T M'}{1 + v^T M' v}

    .. math::
      \text{exact}: \quad M \leftarrow \frac1\gamma \Big( M -
      \frac{(1 - \gamma) M v v^T M}{\gamma + (1 - \gamma) v^T M v} \Big)
      = \big( \gamma M^{-1} + (1 - \gamma) v v^T \big)^{-1}

    for (M, v) = (R, a) and (L, s), every `update_interval` steps; at every step
    :math:`U = c\, R G L`, with c such that the lengths of its kernel and bias parts add
    up to those of the gradient. Leaves outside of `layers` pass through. Any optimizer
    may follow. "exact" first blends M with the identity where an entry of it is large.

    Args:
      layers: name -> (path of the kernel, path of the bias or None). A path is a tuple
        of keys, or those joined by "/". `optax_ext.training.flax_layers` makes it.
      gamma: weight of the old factor, in (0, 1) (official).
      update_interval: steps between updates of factors (official). "reference" skips
        the first, as the official code does.
      clip: inputs are cut to [-clip, clip] before the mean (official); means that you
        pass are not.
      variant: "reference", which produced the published results, or "exact".
      stabilization_threshold: largest entry before the blend ("exact"; the official
        test for a reset).
      zeta: weight of M in the blend, in [0, 1] ("exact"; official).

    Returns:
      A link that needs ``activations``: by name of layer the mean input [in], or inputs
      [..., in] to be averaged; for a convolution those of `im2col_inputs`. For layers
      without bias it also needs ``preact_grads``: by name the gradient of the mean loss
      in the output, summed over the batch [out], or not yet summed [..., out]. Those of
      layers with bias are the gradient of the bias.
      `optax_ext.training.layer_statistics` takes both in the backward pass.

    Raises:
      ValueError: for hyper-parameters outside their range, a path without a leaf, a
        kernel of rank below 2; in `update` for layers without statistics.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> layers = {"dense": ("kernel", "bias")}
      >>> tx = ox.scale_by_mkor(layers, update_interval=1, variant="exact")
      >>> g = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
      >>> inputs = {"dense": jnp.ones((4, 2))}
      >>> u, _ = tx.update(g, tx.init(g), activations=inputs)
      >>> print(u["bias"].round(3))
      [1. 1. 1.]
    """
    owner = "scale_by_mkor"
    check_hyperparam(owner, low=0.0, high=1.0, open_low=True, zeta=zeta)
    check_hyperparam(owner, low=0.0, open_low=True, gamma=gamma, clip=clip)
    check_rate(owner, gamma=gamma)
    check_hyperparam(owner, low=0.0, stabilization_threshold=stabilization_threshold)
    check_interval(owner, update_interval=update_interval)
    check_choice(owner, "variant", variant, ("reference", "exact"))

    def present(leaves):
        for name, (kernel, bias) in layers.items():
            g, b = leaves.get(kernel), leaves.get(bias)
            if g is not None:
                if g.ndim < 2:
                    raise ValueError(f"{owner}: {path_name(kernel)!r} is no matrix")
                yield name, g, b

    def moved(m, v):
        if variant == "reference":
            return _reference(m, v, gamma)
        return _exact(m, v, gamma, stabilization_threshold, zeta)

    def init(params):
        factors = {}
        for name, w, b in present(LeavesByPath(params, owner)):
            fan_in, fan_out = matrix_shape(w.shape)
            sides, dtype = (fan_in + (b is not None), fan_out), computing_dtype(w)
            factors[name] = MKORFactors(*(jnp.eye(n, dtype=dtype) for n in sides))
        return MKORState(jnp.zeros([], jnp.int32), factors)

    def update(updates, state, params=None, **extra):
        del params
        require(owner, extra, "activations")
        leaves = LeavesByPath(updates, owner)
        found = list(present(leaves))

        def refresh():
            new = {}
            for name, _, b in found:
                old = state.factors[name]
                of = _statistics(name, extra, b, clip, old.inputs.dtype)
                new[name] = MKORFactors(*map(moved, old, of))
            return new

        due = state.count % update_interval == 0
        if variant == "reference":
            due &= state.count > 0
        old = {name: state.factors[name] for name, *_ in found}
        factors = jax.lax.cond(due, refresh, lambda: old)
        for name, g, b in found:
            kernel, bias = layers[name]
            r, l = factors[name]
            rows = [as_matrix(g)] if b is None else [as_matrix(g), b[None]]
            grads = jnp.concatenate([x.astype(r.dtype) for x in rows])
            fan_in = len(rows[0])
            u = _rescaled(r @ grads @ l, grads, fan_in)
            leaves.put(kernel, u[:fan_in])
            if b is not None:
                leaves.put(bias, u[fan_in:])
        state = MKORState(next_count(state.count), {**state.factors, **factors})
        return leaves.tree(), state

    return optax.GradientTransformationExtraArgs(init, update)
