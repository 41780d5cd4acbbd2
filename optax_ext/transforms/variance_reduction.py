r"""MARS: variance reduction in front of any optimizer.

The gradient of a batch is noisy, and so is the gradient of the same batch one step ago.
Their difference is less so, and added to the gradient it cancels part of the noise that
the momentum still carries. `scale_by_mars_correction` does that and nothing else; any
direction may follow it. `mars` is the paper's three choices of it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_choice, check_hyperparam, check_rate
from optax_ext._core.extra_args import require
from optax_ext._core.geometry import length
from optax_ext._core.leaves import leafwise, map_leaves
from optax_ext._core.newton_schulz import newton_schulz
from optax_ext._core.optimizers import adam_direction, finish
from optax_ext._core.trees import Bucket, is_hole, is_unit

_MARS = "MARS: Unleashing the Power of Variance Reduction for Training Large Models"


class MarsState(NamedTuple):
    """State of `scale_by_mars_correction` in its approximate form."""

    previous: optax.Updates


@catalogued(
    title=_MARS,
    arxiv="2411.10438",
    kind="link",
    state="1 (previous gradient); exact: none",
    slots=1,
    variant="stores the raw gradient, before correction and clip.",
    compared="goldens mars_*; STORM for gamma = 1 and exact gradients",
)
def scale_by_mars_correction(
    b1: float = 0.95,
    gamma: float = 0.025,
    max_norm: float = 1.0,
    exact: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Correct a gradient by its change since the last step, then clip each leaf.

    .. math::
      c_t = g_t + \gamma \frac{b_1}{1 - b_1} (g_t - r_t), \qquad
      \text{out} = \frac{c_t}{\max(1, |c_t| / \text{max\_norm})}

    r is the gradient of the last step (0 before the first) or, exactly, the gradient of
    the present batch at the last parameters. Put it first in a chain.

    Args:
      b1: decay rate of the momentum that follows, in [0, 1); official code.
      gamma: strength of the correction; 0 has none, 1 is STORM (official code: 0.025).
      max_norm: largest norm of a leaf; ``float("inf")`` for no clip.
      exact: take r from the extra argument ``aux_grads`` and store nothing. At the
        first step zeros (official code) or the gradient itself make sense. It costs a
        second gradient a step.

    Returns:
      A link that emits corrected gradients.

    Raises:
      ValueError: for hyper-parameters outside their range; at trace time where exact is
        set and ``aux_grads`` is missing.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> tx = ox.scale_by_mars_correction(b1=0.5, gamma=0.5, max_norm=float("inf"))
      >>> state = tx.init(jnp.zeros(2))
      >>> _, state = tx.update(jnp.array([1.0, 1.0]), state)
      >>> print(tx.update(jnp.array([1.0, 2.0]), state)[0])
      [1.  2.5]
    """
    owner = "scale_by_mars_correction"
    check_rate(owner, b1=b1)
    check_hyperparam(owner, gamma=gamma)
    check_hyperparam(owner, low=0.0, open_low=True, max_norm=max_norm)

    def corrected(g, r):
        c = g + gamma * b1 / (1 - b1) * (g - r)
        return c / jnp.maximum(1, length(c) / max_norm)

    def init(p):
        return (jnp.zeros_like(p),)

    def update(g, slots, p, t):
        del p, t
        (previous,) = slots
        return corrected(g, previous), (g,)

    def update_exact(updates, state, params=None, **extra):
        del params
        aux_grads = require(owner, extra, "aux_grads")

        def rule(g, slots, r):
            return corrected(g, r), slots

        return map_leaves(rule, updates, (), (aux_grads,))[0], state

    if exact:
        init_exact = optax.identity().init
        return optax.GradientTransformationExtraArgs(init_exact, update_exact)
    return leafwise(MarsState, init, update)


def _orthogonalized(b1: float, eps: float) -> optax.GradientTransformation:
    """Matrices [in, out] with singular values near 1, as Muon scales them."""

    def init(p):
        del p
        return ()

    def update(m, slots, p, t):
        del p, t
        fan_in, fan_out = m.shape
        o = newton_schulz(m / (1 - b1), eps=eps)
        return o * max(1, fan_out / fan_in) ** 0.5, slots

    return leafwise(optax.EmptyState, init, update)


@catalogued(
    title=_MARS,
    arxiv="2411.10438",
    kind="optimizer",
    needs=("params",),
    state="3 (previous gradient and Adam's moments; lion and shampoo 2; exact 1 less); "
    "leaves that are no matrices 2",
    slots=3,
    variant="both moments from the clipped correction, as in paper and code; the "
    "README's second moment of the plain gradient is another rule.",
    compared="goldens mars_adamw, mars_lion, mars_shampoo, mars_exact; optax.adamw and "
    "optax.lion at special settings",
    example=lambda: {"learning_rate": 0.01, "weight_decay_1d": 0.0},
)
def mars(
    learning_rate: optax.ScalarOrSchedule = 3e-3,
    variant: str = "adamw",
    b1: float = 0.95,
    b2: float = 0.99,
    eps: float = 1e-8,
    gamma: float = 0.025,
    max_norm: float = 1.0,
    weight_decay: float = 0.0,
    mask: Any = None,
    *,
    exact: bool = False,
    optimize_1d: bool = False,
    learning_rate_1d: optax.ScalarOrSchedule | None = None,
    b1_1d: float = 0.9,
    b2_1d: float = 0.95,
    weight_decay_1d: float = 0.1,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW, Lion or an orthogonalised step on variance-reduced gradients.

    With c the corrected and clipped gradient of `scale_by_mars_correction`:

    .. math::
      u_t = \begin{cases}
        \hat m_t / (\sqrt{\hat v_t} + \epsilon) & \text{"adamw"} \\
        \text{sign}(m_t) & \text{"lion"} \\
        \text{NewtonSchulz}(m_t / (1 - b_1)) \sqrt{\max(1, \text{out}/\text{in})}
          & \text{"shampoo"}
      \end{cases} \qquad m_t = b_1 m_{t-1} + (1 - b_1) c_t

    This holds for leaves of rank 2. All others, convolution kernels included, get AdamW
    with the ``_1d`` arguments. The defaults are those of the official class; its GPT-2
    small run has learning_rate 6e-3, weight_decay 1e-2 and learning_rate_1d 3e-3.

    Args:
      learning_rate: number or schedule, for matrices.
      variant: "adamw", "lion" or "shampoo".
      b1: decay rate of the first moment, in [0, 1).
      b2: decay rate of the second moment, in [0, 1); "adamw" only.
      eps: added to the root of the second moment, or to the Frobenius norm.
      gamma: strength of the correction.
      max_norm: largest norm of a corrected leaf.
      weight_decay: decoupled decay of matrices, multiplied by the learning rate.
      mask: which leaves decay, as in `optax.add_decayed_weights`.
      exact: take the reference gradient from the extra argument ``aux_grads``: that of
        the present batch at the last parameters (zeros at the first step).
      optimize_1d: give every leaf the rule of matrices ("shampoo": its "adamw" form).
      learning_rate_1d: number or schedule for the other leaves; None is learning_rate.
      b1_1d: decay rate of their first moment, in [0, 1).
      b2_1d: decay rate of their second moment, in [0, 1).
      weight_decay_1d: their decoupled decay, multiplied by their learning rate.

    Returns:
      A finished optimizer.

    Raises:
      ValueError: for an unknown variant or hyper-parameters outside their range; at
        trace time without params, or where exact is set and ``aux_grads`` is missing.

    Example:
      >>> import optax_ext as ox
      >>> tx = ox.mars(6e-3, variant="lion", weight_decay=1e-2, learning_rate_1d=3e-3)
    """
    check_choice("mars", "variant", variant, ("adamw", "lion", "shampoo"))
    adamw = adam_direction("mars", b1, b2, eps, 0.0, None)
    momentum = optax.ema(b1, debias=False)
    direction = {
        "adamw": adamw,
        "lion": optax.chain(momentum, optax.scale_by_sign()),
        "shampoo": optax.chain(momentum, _orthogonalized(b1, eps)),
    }
    correction = scale_by_mars_correction(b1, gamma, max_norm, exact)
    plain = adam_direction("mars", b1_1d, b2_1d, eps, 0.0, None)
    rate_1d = learning_rate if learning_rate_1d is None else learning_rate_1d
    check_hyperparam("mars", weight_decay_1d=weight_decay_1d)

    def corrected(link):
        options = {"learning_rate": learning_rate, "weight_decay": weight_decay}
        return finish(correction, link, **options, mask=mask, owner="mars")

    other = finish(
        plain,
        learning_rate=rate_1d,
        weight_decay=weight_decay_1d,
        mask=mask,
        owner="mars",
    )
    if optimize_1d:
        other = corrected(adamw if variant == "shampoo" else direction[variant])

    def label(p):
        if is_hole(p):
            return p
        rank = p.stack.ndim - 1 if isinstance(p, Bucket) else p.ndim
        return "matrix" if rank == 2 else "other"

    def labels(params):
        return jax.tree.map(label, params, is_leaf=is_unit)

    return optax.partition(
        {"matrix": corrected(direction[variant]), "other": other}, labels
    )
