"""Wrappers that compare an update with the raw gradient, entry by entry.

A momentum points where past gradients did. Where it disagrees in sign with the gradient
of the present batch, the step is likely to hurt: `cautious` leaves those entries out,
`grams` turns them around. Both need the gradient as it entered, so they wrap the link
whose direction they judge; moments inside go on as if nothing happened.

Wrap links that emit the un-negated direction (`scale_by_*`). Around a finished
optimizer, whose updates are negated already, every test would be inverted.
"""

from typing import Any

import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_choice, check_hyperparam
from optax_ext._core.leaves import Rule, map_leaves
from optax_ext._core.optimizers import adam_direction, finish
from optax_ext._core.views import full_precision


def _judged(
    inner: optax.GradientTransformation, rule: Rule
) -> optax.GradientTransformationExtraArgs:
    """`inner`, with rule(u, (), g) applied to its update u and the gradient g."""
    inner = optax.with_extra_args_support(inner)

    def update(updates, state, params=None, **extra):
        direction, state = inner.update(updates, state, params, **extra)
        return map_leaves(rule, direction, (), (updates,))[0], state

    return optax.GradientTransformationExtraArgs(inner.init, update)


@catalogued(
    title="Cautious Optimizers: Improving Training with One Line of Code",
    arxiv="2411.16085",
    kind="wrapper",
    state="that of inner",
    variant="mean with a clamp, as the official C-AdamW since 2025; 'count' is that of "
    "C-Lion and of the first release.",
    compared="goldens cautious_adamw (mean), cautious_lion (count)",
    example=lambda: {"inner": optax.trace(0.9)},
)
def cautious(
    inner: optax.GradientTransformation,
    normalize: str = "mean",
    min_mean: float = 1e-3,
) -> optax.GradientTransformationExtraArgs:
    r"""Keep only the entries of an update that agree in sign with the gradient.

    With u the update of `inner`, g the gradient, d the entries of the leaf:

    .. math::
      \phi = 1[u g > 0], \qquad
      \text{out} = \begin{cases}
        u \phi / \max(\text{mean}(\phi), \text{min\_mean}) & \text{"mean"} \\
        u \phi\, d / (\textstyle\sum \phi + 1) & \text{"count"} \\
        u \phi & \text{"none"}
      \end{cases}

    Means and counts are over one leaf. Entries whose gradient is zero do not move and
    do count. A leaf in which few entries live (an embedding) is enlarged by up to
    1/min_mean; use ``normalize="none"`` or `optax.masked` there. Decay is not judged:
    put `optax.add_decayed_weights` behind the wrapper.

    Args:
      inner: a link that emits the un-negated direction.
      normalize: how the kept entries are enlarged: "mean", "count" or "none".
      min_mean: smallest mean to divide by, in (0, 1] (official code).

    Returns:
      A link with the state of `inner`.

    Raises:
      ValueError: for an unknown `normalize` or `min_mean` outside (0, 1].

    Example:
      >>> import jax.numpy as jnp, optax, optax_ext as ox
      >>> tx = ox.cautious(optax.trace(0.9))
      >>> state = tx.init(jnp.zeros(2))
      >>> _, state = tx.update(jnp.array([1.0, 1.0]), state)
      >>> updates, state = tx.update(jnp.array([1.0, -0.5]), state)
      >>> print(updates)
      [3.8 0. ]
    """
    check_choice("cautious", "normalize", normalize, ("mean", "count", "none"))
    check_hyperparam("cautious", low=0.0, high=1.0, open_low=True, min_mean=min_mean)

    def rule(u, slots, g):
        # Signs, not u * g: a product of tiny numbers underflows to 0.
        agree = (jnp.sign(u) * jnp.sign(g) > 0).astype(u.real.dtype)
        if normalize == "mean":
            scale = 1 / jnp.maximum(jnp.mean(agree), min_mean)
        elif normalize == "count":
            scale = agree.size / (jnp.sum(agree) + 1)
        else:
            scale = 1.0
        return u * (agree * scale), slots

    return _judged(inner, rule)


@catalogued(
    title="Grams: Gradient Descent with Adaptive Momentum Scaling",
    arxiv="2412.17107",
    kind="wrapper",
    state="that of inner",
    variant="the paper's sign(g) |u|.",
    compared="golden grams_adamw",
    example=lambda: {"inner": optax.trace(0.9)},
)
def grams(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    r"""Take the direction from the gradient's sign and the size from the update.

    .. math:: \text{out} = \text{sign}(g)\, |u|

    Entries whose gradient is zero do not move.

    Args:
      inner: a link that emits the un-negated direction.

    Returns:
      A link with the state of `inner`.

    Example:
      >>> import jax.numpy as jnp, optax, optax_ext as ox
      >>> tx = ox.grams(optax.scale(2.0))
      >>> print(tx.update(jnp.array([1.0, -3.0]), tx.init(jnp.zeros(2)))[0])
      [ 2. -6.]
    """

    def rule(u, slots, g):
        return jnp.sign(g) * jnp.abs(u), slots

    return _judged(inner, rule)


@catalogued(
    title="Grams: Gradient Descent with Adaptive Momentum Scaling",
    arxiv="2412.17107",
    kind="link",
    state="2 (Adam's moments)",
    slots=2,
    variant="eps after the bias correction, as in the paper; the official file adds it "
    "before.",
    compared="golden grams_adamw",
)
def scale_by_grams(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""`grams` around Adam: sign(g) times the size of Adam's step.

    Args:
      b1: decay rate of the first moment, in [0, 1); Adam's default.
      b2: decay rate of the second moment, in [0, 1); Adam's default.
      eps: added to the root of the second moment (official code: 1e-6).
      eps_root: added under the root.
      mu_dtype: dtype of the first moment; None keeps float32.

    Returns:
      A link that emits the un-negated direction.

    Example:
      >>> import optax, optax_ext as ox
      >>> tx = optax.chain(ox.scale_by_grams(), optax.scale_by_learning_rate(1e-3))
    """
    adam = adam_direction("scale_by_grams", b1, b2, eps, eps_root, mu_dtype)
    return full_precision(grams(adam))


@catalogued(
    title="Grams: Gradient Descent with Adaptive Momentum Scaling",
    arxiv="2412.17107",
    kind="optimizer",
    needs=("params",),
    state="2 (Adam's moments)",
    slots=2,
    variant="decay multiplied by the learning rate, not judged by the gradient.",
    compared="golden grams_adamw",
    example=lambda: {"learning_rate": 0.01},
)
def grams_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: Any = None,
    weight_decay: float = 0.0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW with the direction of each entry taken from the present gradient.

    .. math:: x_t = x_{t-1} - \eta_t (\text{sign}(g_t)\, |u_t| + \lambda x_{t-1})

    Args:
      learning_rate: number or schedule.
      b1: decay rate of the first moment, in [0, 1).
      b2: decay rate of the second moment, in [0, 1).
      eps: added to the root of the second moment.
      eps_root: added under the root.
      mu_dtype: dtype of the first moment; None keeps float32.
      weight_decay: decoupled decay, multiplied by the learning rate.
      mask: which leaves decay, as in `optax.add_decayed_weights`.

    Returns:
      A finished optimizer.

    Example:
      >>> import optax_ext as ox
      >>> tx = ox.grams_adamw(1e-3, weight_decay=0.1)
    """
    return finish(
        scale_by_grams(b1, b2, eps, eps_root, mu_dtype),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        mask=mask,
        owner="grams_adamw",
    )
