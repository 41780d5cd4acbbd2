r"""Estimators of the Hessian's diagonal, a service for the links that use it.

An estimator is a `GradientTransformationExtraArgs` whose ``update(updates, state,
params, **extra)`` ignores `updates` and returns a tree like params that estimates
diag(H), signed and unsmoothed, in float32 (float64 for float64 leaves). Four kinds:

* `hutchinson_diag`: z * (H z) for random z. Unbiased; sees negative curvature; one
  Hessian-vector product, about two gradients. Needs ``value_fn``.
* `gauss_newton_bartlett_diag`: B * grad^2 at labels drawn from the model. Unbiased for
  the Gauss-Newton matrix, never negative; one forward and backward pass. Needs
  ``logits_fn``.
* `empirical_fisher_diag`: the mean square of per-example gradients at the true labels.
  Never negative, and no curvature far from a minimum. Needs ``per_example_grads``.
* `external_hessian_diag`: what the caller passes as ``hessian_diag``.

`ema_hessian_diag` averages any of them and calls it every k-th step only. The means are
over the batch that the functions see; under `jax.jit` on sharded arrays that is the
whole batch. Estimators draw from their own key: give two in one chain different keys.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import (
    check_choice,
    check_interval,
    check_params,
    check_rate,
)
from optax_ext._core.extra_args import require
from optax_ext._core.keys import KeyState, key_state
from optax_ext._core.leaves import init_leaves, map_leaves, next_count
from optax_ext._core.trees import computing_dtype
from optax_ext.curvature.products import PROBES, hvp_probe

_SOPHIA = "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model "
SOPHIA_TITLE = _SOPHIA + "Pre-training"


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(computing_dtype(x))


@catalogued(
    title="ADAHESSIAN: An Adaptive Second Order Optimizer for Machine Learning",
    arxiv="2006.00719",
    kind="estimator",
    needs=("params", "value_fn"),
    slots=0,
    variant="Rademacher (smaller variance) or Gaussian probes; mean over draws.",
    compared="closed forms: exact in one Rademacher draw for a diagonal Hessian",
)
def hutchinson_diag(
    probe: str = "rademacher", num_samples: int = 1, key: jax.Array | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Estimate diag(H) by z * (H z), the mean over `num_samples` random z.

    .. math:: \hat h = \frac1n \sum_{i=1}^n z_i \odot (H z_i), \qquad E[\hat h] =
      \text{diag}(H)

    Args:
      probe: "rademacher" (+-1; no variance from the diagonal) or "gaussian" (N(0, 1);
        the Sophia paper's).
      num_samples: draws a call; each costs one Hessian-vector product.
      key: where the draws start; None is ``jax.random.key(0)``.

    Returns:
      An estimator that needs params and the extra argument ``value_fn``.

    Raises:
      ValueError: for an unknown probe or `num_samples` below 1; at trace time without
        params or ``value_fn``.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> estimator, x = ox.hutchinson_diag(), jnp.array([1.0, 2.0])
      >>> f = lambda x: jnp.sum(x**4) / 12
      >>> h, _ = estimator.update(None, estimator.init(x), x, value_fn=f)
      >>> print(h)
      [1. 4.]
    """
    check_choice("hutchinson_diag", "probe", probe, tuple(PROBES))
    check_interval("hutchinson_diag", num_samples=num_samples)
    data, impl = key_state(key)

    def init(params):
        del params
        return KeyState(jnp.array(data))

    def update(updates, state, params: Any = None, **extra):
        del updates
        check_params("hutchinson_diag", params)
        value_fn = require("hutchinson_diag", extra, "value_fn")

        def sample(key):
            hz, z = hvp_probe(value_fn, params, key, probe)
            return jax.tree.map(lambda a, b: _wide(a) * _wide(b), z, hz)

        use, keep = jax.random.split(jax.random.wrap_key_data(state.key, impl=impl))
        if num_samples == 1:
            estimate = sample(use)
        else:
            zero = jax.tree.map(lambda p: jnp.zeros_like(_wide(p)), params)
            total = jax.lax.scan(
                lambda acc, k: (jax.tree.map(jnp.add, acc, sample(k)), None),
                zero,
                jax.random.split(use, num_samples),
            )[0]
            estimate = jax.tree.map(lambda h: h / num_samples, total)
        return estimate, KeyState(jax.random.key_data(keep))

    return optax.GradientTransformationExtraArgs(init, update)


@catalogued(
    title=SOPHIA_TITLE,
    arxiv="2305.14342",
    kind="estimator",
    needs=("params", "logits_fn"),
    slots=0,
    variant="the paper's Algorithm 2, with the factor B in the estimate.",
    compared="golden gnb_diag, with the expectation in closed form",
)
def gauss_newton_bartlett_diag(
    batch_size: int | None = None, key: jax.Array | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Estimate the Gauss-Newton diagonal from labels drawn from the model itself.

    .. math:: y_i \sim \text{softmax}(\text{logits}_i), \qquad
      \hat g = \nabla \frac1B \sum_{i=1}^B \text{CE}(\text{logits}_i, y_i), \qquad
      \hat h = B\, \hat g^2

    Args:
      batch_size: B; None counts the positions of the logits (for a language model
        batch * length), or those that the extra argument ``where`` keeps.
      key: where the draws start; None is ``jax.random.key(0)``.

    Returns:
      An estimator that needs params and the extra argument ``logits_fn``; takes
      ``sampled_labels`` (integers, the shape of the positions) instead of drawing, and
      ``where`` (booleans of that shape) to leave positions out.

    Raises:
      ValueError: at trace time without params or ``logits_fn``.

    Example:
      >>> import jax, jax.numpy as jnp, optax_ext as ox
      >>> estimator, w = ox.gauss_newton_bartlett_diag(), jnp.zeros((3, 2))
      >>> x = jnp.ones((5, 3))
      >>> h, _ = estimator.update(
      ...     None, estimator.init(w), w, logits_fn=lambda w: x @ w)
      >>> h.shape, bool((h >= 0).all())
      ((3, 2), True)
    """
    if batch_size is not None:
        check_interval("gauss_newton_bartlett_diag", batch_size=batch_size)
    data, impl = key_state(key)

    def init(params):
        del params
        return KeyState(jnp.array(data))

    def update(updates, state, params=None, **extra):
        del updates
        check_params("gauss_newton_bartlett_diag", params)
        logits_fn = require("gauss_newton_bartlett_diag", extra, "logits_fn")
        use, keep = jax.random.split(jax.random.wrap_key_data(state.key, impl=impl))

        def loss(params):
            logits = _wide(logits_fn(params))
            labels = extra.get("sampled_labels")
            if labels is None:
                labels = jax.random.categorical(use, jax.lax.stop_gradient(logits))
            chex.assert_shape(
                labels,
                logits.shape[:-1],
                custom_message="sampled_labels must have the shape of the positions",
            )
            losses = optax.losses.softmax_cross_entropy_with_integer_labels(
                logits, labels
            )
            keeps = extra.get("where")
            keeps = jnp.ones_like(losses) if keeps is None else keeps
            positions = jnp.maximum(jnp.sum(keeps.astype(losses.dtype)), 1)
            return jnp.sum(losses * keeps.astype(losses.dtype)) / positions, positions

        ghat, positions = jax.grad(loss, has_aux=True)(params)
        b = positions if batch_size is None else batch_size
        estimate = jax.tree.map(
            lambda g: jnp.asarray(b, g.dtype) * g**2, jax.tree.map(_wide, ghat)
        )
        return estimate, KeyState(jax.random.key_data(keep))

    return optax.GradientTransformationExtraArgs(init, update)


@catalogued(
    title=SOPHIA_TITLE,
    arxiv="2305.14342",
    kind="estimator",
    needs=("hessian_diag",),
    slots=0,
    variant="the caller's estimate, unchanged.",
    compared="goldens sophia, adahessian",
)
def external_hessian_diag() -> optax.GradientTransformationExtraArgs:
    """Take diag(H) from the extra argument ``hessian_diag``.

    Returns:
      An estimator without state that needs ``hessian_diag``, a tree like params.

    Raises:
      ValueError: at trace time without ``hessian_diag``.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> estimator, x = ox.external_hessian_diag(), jnp.zeros(2)
      >>> h, _ = estimator.update(None, estimator.init(x), x, hessian_diag=x + 3)
      >>> print(h)
      [3. 3.]
    """

    def update(updates, state, params=None, **extra):
        del updates, params
        given = require("external_hessian_diag", extra, "hessian_diag")
        return jax.tree.map(_wide, given), state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update
    )


class EmaHessianState(NamedTuple):
    """State of `ema_hessian_diag`."""

    count: jax.Array
    hessian: optax.Updates
    estimator: optax.OptState


@catalogued(
    title=SOPHIA_TITLE,
    arxiv="2305.14342",
    kind="estimator",
    needs=("params", "logits_fn"),
    state="1 (average), and the estimator's",
    slots=1,
    variant="refreshed before use, at steps 0, k, 2k, ...; no bias correction.",
    compared="goldens sophia, sophia_g",
    example=lambda: {"estimator": gauss_newton_bartlett_diag()},
)
def ema_hessian_diag(
    estimator: optax.GradientTransformation,
    decay: float = 0.99,
    update_interval: int = 10,
) -> optax.GradientTransformationExtraArgs:
    r"""Exponential average of an estimator that is called every k-th step.

    .. math:: h_t = \begin{cases} b\, h_{t-1} + (1 - b)\, \hat h_t & t \bmod k = 0 \\
      h_{t-1} & \text{else} \end{cases} \qquad t = 0, 1, \dots

    Args:
      estimator: any estimator of this module.
      decay: b, in [0, 1) (Sophia: 0.99).
      update_interval: k; between refreshes the estimator is not run (`jax.lax.cond`).

    Returns:
      An estimator that emits the average, zero-initialised and not bias-corrected.

    Raises:
      ValueError: for `decay` outside [0, 1) or `update_interval` below 1.

    Example:
      >>> import optax_ext as ox
      >>> estimator = ox.ema_hessian_diag(ox.hutchinson_diag(), decay=0.95)
    """
    check_rate("ema_hessian_diag", decay=decay)
    check_interval("ema_hessian_diag", update_interval=update_interval)
    estimator = optax.with_extra_args_support(estimator)

    def init(params):
        (hessian,) = init_leaves(lambda p: (jnp.zeros_like(p),), params, 1)
        return EmaHessianState(
            jnp.zeros([], jnp.int32), hessian, estimator.init(params)
        )

    def update(updates, state, params=None, **extra):
        def average(old, slots, new):
            return decay * old + (1 - decay) * new, slots

        def refresh():
            estimate, inner = estimator.update(
                updates, state.estimator, params, **extra
            )
            return map_leaves(average, state.hessian, (), (estimate,))[0], inner

        hessian, inner = jax.lax.cond(
            state.count % update_interval == 0,
            refresh,
            lambda: (state.hessian, state.estimator),
        )
        return hessian, EmaHessianState(next_count(state.count), hessian, inner)

    return optax.GradientTransformationExtraArgs(init, update)
