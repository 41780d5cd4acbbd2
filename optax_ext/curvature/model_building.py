r"""Stochastic model building: what to do with a step that did not work.

A step of gradient descent that fails the test of Armijo is not thrown away: its value
was poor, but its gradient tells how the loss bends along it. Each leaf builds a
quadratic model of the two gradients and steps to its minimum.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam, check_interval, check_params
from optax_ext._core.extra_args import require
from optax_ext._core.geometry import length, tree_length
from optax_ext._core.leaves import at_step, map_leaves, next_count
from optax_ext._core.states import fill, scalar_dtype


class SmbState(NamedTuple):
    """State of `smb`.

    `learning_rate` is that of the next step with an automatic schedule, else that of
    the last; `model_steps` counts steps by the model, with an automatic schedule since
    its last decision.
    """

    count: jax.Array
    learning_rate: jax.Array
    model_steps: jax.Array


@catalogued(
    title="Bolstering Stochastic Gradient Descent with Model Building",
    arxiv="2111.07058",
    kind="optimizer",
    needs=("params", "value", "value_fn"),
    state="0 (3 scalars)",
    slots=0,
    variant="the authors' code: one test for all leaves, one model a leaf, the model's "
    "step in place of the trial; a leaf without gradient stays where it is.",
    compared="golden smb",
    terminal=True,
)
def smb(
    learning_rate: optax.ScalarOrSchedule = 0.5,
    eta: float = 0.99,
    c: float = 0.1,
    grad_norm_eps: float = 1e-8,
    auto_schedule: bool = False,
    window: int = 500,
    threshold: float = 0.05,
    factor: float = 0.9,
    max_learning_rate: float = 20.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Gradient descent that corrects the steps that fail.

    The trial is :math:`s = -\alpha g`. If :math:`f(x + s) \le f(x) - c\, \alpha |g|^2`,
    or :math:`|g|` is below `grad_norm_eps`, it is the step. Else, leaf by leaf, with
    :math:`y = \nabla f(x + s) - g`,

    .. math:: \sigma = \frac{|s| (|y| + |g| / \eta) - y^\top s}{2}, \qquad
      \theta = (y^\top s + 2 \sigma)^2 - |s|^2 |y|^2

    .. math:: c_g = -\frac{|s|^2}{2 \sigma}, \quad
      c_s = \frac{c_g}{\theta} \left( -(y^\top s + 2 \sigma)\, y^\top g + |y|^2 s^\top g
      \right), \quad
      c_y = \frac{c_g}{\theta} \left( -(y^\top s + 2 \sigma)\, s^\top g + |s|^2 y^\top g
      \right)

    and the step is :math:`c_s s + c_g g + c_y y`, never longer than :math:`\eta |s|`.

    Args:
      learning_rate: :math:`\alpha`, a number or, without `auto_schedule`, a schedule
        (every experiment of the authors: 0.5).
      eta: largest length of a model's step, in trials, in (0, 1) (official code).
      c: share of the promised decrease that passes, 0 or more (official code).
      grad_norm_eps: gradients shorter than this are not tested (official code).
      auto_schedule: after each `window` steps, multiply the learning rate by `factor`
        if the share of model steps was above `threshold`, else divide by it.
      window: steps between such decisions.
      threshold: share of model steps, in [0, 1].
      factor: in (0, 1).
      max_learning_rate: the learning rate does not grow beyond.

    Returns:
      A finished optimizer, last in a chain. It needs params, ``value`` and ``value_fn``
      of the same batch: one value a step, and one gradient where the test fails.

    Raises:
      ValueError: for hyper-parameters outside their range, or a schedule together with
        `auto_schedule`; at trace time for a missing argument.

    Example:
      >>> import jax, jax.numpy as jnp, optax_ext as ox
      >>> f = lambda x: jnp.sum(jnp.array([1.0, 30.0]) * x**2) / 2
      >>> tx, x = ox.smb(), jnp.ones(2)
      >>> state = tx.init(x)
      >>> for _ in range(100):
      ...     value, grad = jax.value_and_grad(f)(x)
      ...     step, state = tx.update(grad, state, x, value=value, value_fn=f)
      ...     x = x + step
      >>> bool(f(x) < 1e-4)
      True
    """
    owner = "smb"
    check_hyperparam(owner, low=0.0, c=c, grad_norm_eps=grad_norm_eps)
    check_hyperparam(owner, low=0.0, learning_rate=learning_rate)
    check_hyperparam(owner, low=0.0, high=1.0, open_low=True, open_high=True, eta=eta)
    check_hyperparam(
        owner, low=0.0, high=1.0, open_low=True, open_high=True, factor=factor
    )
    check_hyperparam(owner, low=0.0, high=1.0, threshold=threshold)
    check_hyperparam(owner, low=0.0, max_learning_rate=max_learning_rate)
    check_interval(owner, window=window)
    if auto_schedule and callable(learning_rate):
        raise ValueError(
            f"{owner}: auto_schedule changes a number: give learning_rate as one"
        )

    def init(params):
        start = 0.0 if callable(learning_rate) else learning_rate
        start = jnp.asarray(start, scalar_dtype(params))
        return SmbState(jnp.zeros([], jnp.int32), start, jnp.zeros([], jnp.int32))

    def rate_of(state):
        if auto_schedule:
            return state.learning_rate
        t = next_count(state.count).astype(state.learning_rate.dtype)
        return jnp.asarray(at_step(learning_rate, t), t.dtype)

    def model(g, slots, g_trial, rate):
        """The model's step of one leaf.

        It is linear in s and does not change if g and y are scaled together. With |s|
        taken out, s'g = -|g|, y's + 2 sigma = |y| + |g| / eta, and |g| / eta cancels in
        theta = (|g| / eta) (2 |y| + |g| / eta): so no square can overflow.
        """
        g_norm, y = length(g), g_trial - g
        scale = jnp.maximum(g_norm, length(y))
        scale = jnp.where(scale > 0, scale, 1)
        s = -g / jnp.where(g_norm > 0, g_norm, 1)
        y, n = y / scale, g_norm / scale
        b, ys, r = length(y), jnp.sum(y * s), n / eta
        gap = jnp.maximum(b - ys, 0)  # 2 sigma = gap + r
        both = jnp.where(gap + r > 0, gap + r, 1)
        along_y = -1 / jnp.where(2 * b + r > 0, 2 * b + r, 1) * eta
        along_s = n / both + along_y * (r * ys - gap * b) / both
        step = rate.astype(g.dtype) * g_norm * (along_s * s + along_y * y)
        return jnp.where(g_norm > 0, step, 0), slots

    def update(updates, state, params=None, **extra):
        check_params(owner, params)
        value = jnp.asarray(require(owner, extra, "value"))
        value_fn = require(owner, extra, "value_fn")
        rate, norm = rate_of(state), tree_length(updates)

        def descend(g, slots):
            return -rate.astype(g.dtype) * g, slots

        def move(s, slots, p):
            return p + s, slots

        trial, _ = map_leaves(descend, updates, owner=owner)
        there = fill(map_leaves(move, trial, (), (params,), owner=owner)[0], params)

        def modelled():
            def rule(g, slots, g_trial):
                return model(g, slots, g_trial, rate)

            new = jax.grad(value_fn)(there)
            return map_leaves(rule, updates, (), (new,), owner=owner)[0]

        wide = norm.dtype
        promised = value.astype(wide) - c * rate.astype(wide) * norm * norm
        passes = value_fn(there).astype(wide) <= promised
        accepted = passes | (norm < grad_norm_eps)
        out = jax.lax.cond(accepted, lambda: trial, modelled)
        count = next_count(state.count)
        models = state.model_steps + (~accepted).astype(jnp.int32)
        if not auto_schedule:
            return out, SmbState(count, rate, models)
        ends = count % window == 0
        share = models.astype(rate.dtype) / window
        grown = jnp.where(rate / factor <= max_learning_rate, rate / factor, rate)
        new_rate = jnp.where(share > threshold, rate * factor, grown)
        return out, SmbState(
            count,
            jnp.where(ends, new_rate, rate).astype(rate.dtype),
            jnp.where(ends, 0, models),
        )

    return optax.GradientTransformationExtraArgs(init, update)
