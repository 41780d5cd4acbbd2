r"""Wrappers that train on spheres: `lawn`, and `normalize_and_project`.

Both hold each weight at a fixed length; see `optax_ext.transforms.sphere` for why. They
differ in which length (that of a free first phase, or the initial one), and in whether
the gradient knows: `lawn` takes gradients and updates in the tangent space, so that the
moments inside know nothing of the direction in which nothing can move.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_params
from optax_ext._core.geometry import length, tangent, to_sphere
from optax_ext._core.leaves import init_leaves, map_leaves, next_count
from optax_ext._core.trees import treated
from optax_ext.transforms.sphere import project_to_init_norm


class LawnState(NamedTuple):
    """State of `lawn`: steps taken, lengths held (0: free), and that of inner."""

    count: jax.Array
    norm: Any
    inner_state: Any


@catalogued(
    title="Logit Attenuating Weight Normalization",
    arxiv="2108.05839",
    kind="wrapper",
    needs=("params",),
    state="that of inner, and 1 scalar a leaf",
    variant="the moments inside are kept at the switch; the ramp after it is linear. "
    "There is no public code.",
    compared="goldens lawn_sgd, lawn_adam; closed form of the length",
    example=lambda: {"inner": optax.trace(0.9), "free_steps": 1},
)
def lawn(
    inner: optax.GradientTransformation,
    free_steps: int,
    warmup_steps: int = 0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Train freely at first, then hold the length of each weight.

    From step `free_steps` on, with c the length of w at that step and
    :math:`P_w x = x - w \langle w, x \rangle / |w|^2`:

    .. math::
      u = P_w\, \text{inner}(P_w g), \qquad
      \text{out} = c\, \frac{w + f u}{|w + f u|} - w

    f rises to 1 during `warmup_steps`, for all leaves. Lengths are those of whole
    leaves. Weights whose length is 0 at the switch stay free. The radial part of weight
    decay inside `inner` vanishes on the sphere, and decay with it. Where the learning
    rate should restart with the second phase, join two schedules.

    Args:
      inner: a finished optimizer, whose updates are what is added to the parameters.
      free_steps: steps before the switch, 0 or more; the hyper-parameter to tune.
      warmup_steps: steps of the ramp after the switch; 0 has none.
      mask: which leaves are held: tree of booleans, or function of params; None holds
        leaves of rank 2 and more. The paper holds the layers behind the last
        normalisation only.

    Returns:
      A finished optimizer.

    Raises:
      ValueError: for negative step counts, or where `update` is called without params.

    Example:
      >>> import jax.numpy as jnp, optax, optax_ext as ox
      >>> tx = ox.lawn(optax.sgd(1.0), free_steps=0)
      >>> w = jnp.array([[3.0, 4.0]])
      >>> u, _ = tx.update(jnp.array([[-4.0, 3.0]]), tx.init(w), w)
      >>> print(jnp.linalg.norm(optax.apply_updates(w, u)).round(4))
      5.0
    """
    for name, steps in (("free_steps", free_steps), ("warmup_steps", warmup_steps)):
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(
                f"lawn: {name} must be an integer of 0 or more, got {steps!r}"
            )
    inner = optax.with_extra_args_support(inner)

    def init(params):
        (norm,) = init_leaves(lambda w: (jnp.zeros((), w.dtype),), params, 1)
        return LawnState(jnp.zeros([], jnp.int32), norm, inner.init(params))

    def update(updates, state, params: Any = None, **extra):
        check_params("lawn", params)
        t = state.count

        def enter(g, slots, w, keep):
            (norm,) = slots
            if keep:
                norm = jnp.where(t == free_steps, length(w), norm)
            return jnp.where(norm > 0, tangent(g, w), g), (norm,)

        def leave(u, slots, w, norm):
            if warmup_steps:
                ramp = (t - free_steps + 1).astype(u.dtype) / warmup_steps
                u = u * jnp.where(t < free_steps, 1, jnp.minimum(1, ramp))
            along = jnp.where(norm > 0, tangent(u, w), u)
            return to_sphere(along, w, norm), slots

        others = (params, treated(mask, params))
        updates, (norms,) = map_leaves(enter, updates, (state.norm,), others)
        updates, kept = inner.update(updates, state.inner_state, params, **extra)
        updates, _ = map_leaves(leave, updates, (), (params, norms))
        return updates, LawnState(next_count(t), norms, kept)

    return optax.GradientTransformationExtraArgs(init, update)


@catalogued(
    title="Normalization and effective learning rates in reinforcement learning",
    arxiv="2407.01800",
    kind="wrapper",
    needs=("params",),
    state="that of inner, and 1 scalar a leaf",
    variant="every leaf of rank 2 or more, by its whole norm.",
    compared="golden project_to_init_norm",
    example=lambda: {"inner": optax.trace(0.9)},
)
def normalize_and_project(
    inner: optax.GradientTransformation, mask: Any = None, every: int = 1
) -> optax.GradientTransformationExtraArgs:
    """Scale each weight back to its initial length after the steps of `inner`.

    It is ``chain(inner, project_to_init_norm(mask, every))``; the network has to
    normalise behind each weight that is treated.

    Args:
      inner: a finished optimizer, whose updates are what is added to the parameters.
      mask: which leaves are treated: tree of booleans, or function of params; None
        treats leaves of rank 2 and more.
      every: steps from one projection to the next.

    Returns:
      A finished optimizer.

    Raises:
      ValueError: for `every` below 1, or where `update` is called without params.

    Example:
      >>> import optax, optax_ext as ox
      >>> tx = ox.normalize_and_project(optax.adam(1e-3))
    """
    inner = optax.with_extra_args_support(inner)
    tx: Any = optax.chain(inner, project_to_init_norm(mask, every))
    return tx
