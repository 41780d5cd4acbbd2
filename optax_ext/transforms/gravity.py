"""Gravity: momentum of gradients whose largest entries are squashed.

A body on a slope of gradient g is accelerated sideways by g / (1 + g^2): the steeper
the slope, the more it falls and the less it moves. The paper scales g in the square by
the largest gradient of its leaf, so that entries of middling size move most.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam, check_rate
from optax_ext._core.leaves import at_step, init_leaves, leafwise
from optax_ext._core.optimizers import finish

_TITLE = "Gravity Optimizer: a Kinematic Approach on Optimization in Deep Learning"


class GravityState(NamedTuple):
    """State of `scale_by_gravity`."""

    count: jax.Array
    velocity: optax.Updates


def _normal_like(key: jax.Array | None, tree: Any, std: Any) -> Any:
    """Normal numbers in place of zeros, drawn for each leaf with a key of its own.

    A stack of leaves is one draw, so that its rows are independent too. Added to the
    zeros, the numbers take their dtype and sharding.
    """
    leaves, treedef = jax.tree.flatten(tree)
    if any(isinstance(zero, jax.ShapeDtypeStruct) for zero in leaves):
        return tree
    keys = jax.random.split(jax.random.key(0) if key is None else key, len(leaves))

    def draw(key, zero):
        noise = jax.random.normal(key, zero.shape, zero.dtype)
        return zero + jnp.asarray(std, zero.real.dtype) * noise

    return treedef.unflatten(map(draw, keys, leaves))


@catalogued(
    title=_TITLE,
    arxiv="2101.09192",
    kind="link",
    state="1 (velocity)",
    slots=1,
    variant="the paper's Algorithm 1, which counts from 1; the Keras file behind its "
    "tables counts from 0 (count_start=0).",
    compared="goldens gravity, gravity_v0",
)
def scale_by_gravity(
    b: float = 0.9,
    v0_std: float = 0.1,
    count_start: int = 1,
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Average gradients whose largest entries are squashed.

    .. math::
      \zeta_t = \frac{g_t}{1 + (g_t \max|g_t|)^2}, \quad
      \hat b_t = \frac{b n + 1}{n + 2}, \quad
      V_t = \hat b_t V_{t-1} + (1 - \hat b_t) \zeta_t, \quad u_t = V_t

    with n = t - 1 + `count_start`, the maximum over one leaf, and V_0 drawn from
    N(0, v0_std^2). It is not invariant to the scale of the gradient: far above 1, a
    leaf hardly moves.

    Args:
      b: decay rate that the average approaches, in [0, 1) (paper).
      v0_std: standard deviation of the initial velocity; the paper's alpha over the
        learning rate.
      count_start: 1 for the paper's Algorithm 1, 0 for the authors' Keras file.
      key: where the initial velocity is drawn from; None is ``jax.random.key(0)``.

    Returns:
      A link that emits the un-negated direction.

    Raises:
      ValueError: for hyper-parameters outside their range.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> tx, g = ox.scale_by_gravity(v0_std=0.0), jnp.array([0.0, 1.0, -1.0, 0.5])
      >>> print(tx.update(g, tx.init(g))[0])
      [ 0.          0.18333334 -0.18333334  0.14666668]
    """
    owner = "scale_by_gravity"
    check_rate(owner, b=b)
    check_hyperparam(owner, low=0.0, v0_std=v0_std, count_start=count_start)

    def zeros(p):
        return (jnp.zeros_like(p),)

    def init(params):
        (velocity,) = init_leaves(zeros, params, 1)
        return GravityState(
            jnp.zeros([], jnp.int32), _normal_like(key, velocity, v0_std)
        )

    def update(g, slots, p, t):
        del p
        (v,) = slots
        n = t - 1 + count_start
        b_hat = (b * n + 1) / (n + 2)
        size = jnp.abs(g)
        zeta = g / (1 + (size * jnp.max(size)) ** 2)
        v = b_hat * v + (1 - b_hat) * zeta
        return v, (v,)

    return leafwise(GravityState, zeros, update)._replace(init=init)


@catalogued(
    title=_TITLE,
    arxiv="2101.09192",
    kind="optimizer",
    state="1 (velocity)",
    slots=1,
    variant="the paper's Algorithm 1, as scale_by_gravity; no clip, no decay.",
    compared="goldens gravity, gravity_v0",
)
def gravity(
    learning_rate: optax.ScalarOrSchedule = 0.1,
    alpha: float = 0.01,
    b: float = 0.9,
    count_start: int = 1,
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Gravity, the kinematic optimizer.

    .. math:: x_t = x_{t-1} - \eta_t V_t, \qquad V_0 \sim N(0, (\alpha / \eta_1)^2)

    with V from `scale_by_gravity`.

    Args:
      learning_rate: number or schedule (paper: 0.1).
      alpha: standard deviation of the initial velocity times the first learning rate
        (paper: 0.01); 0 starts at rest.
      b: decay rate that the average approaches, in [0, 1) (paper).
      count_start: 1 for the paper's Algorithm 1, 0 for the authors' Keras file.
      key: where the initial velocity is drawn from; None is ``jax.random.key(0)``.

    Returns:
      A finished optimizer.

    Raises:
      ValueError: for hyper-parameters outside their range; for a learning rate that
        starts at 0 unless `alpha` is 0.

    Example:
      >>> import optax_ext as ox
      >>> tx = ox.gravity(0.1)
    """
    check_hyperparam("gravity", low=0.0, alpha=alpha)
    v0_std = alpha
    if not (isinstance(alpha, int | float) and alpha == 0):
        first = at_step(learning_rate, jnp.ones(()))
        message = "learning_rate at the first step (alpha=0 lets it be 0)"
        check_hyperparam("gravity", low=0.0, open_low=True, **{message: first})
        v0_std = alpha / first
    return finish(
        scale_by_gravity(b, v0_std, count_start, key),
        learning_rate=learning_rate,
        owner="gravity",
    )
