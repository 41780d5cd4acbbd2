r"""SWATS: Adam first, then SGD at the rate that Adam's own steps imply.

An Adam step u is not along the gradient g, but there is one rate gamma at which an SGD
step, projected on u, is u itself. When the average of that rate has settled, SGD can
take over at it, and generalises better from there.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_choice, check_hyperparam
from optax_ext._core.geometry import inner_product
from optax_ext._core.leaves import at_step, init_leaves, map_leaves
from optax_ext._core.optimizers import adam_direction
from optax_ext._core.views import full_precision


class SwatsState(NamedTuple):
    """State of `swats`: Adam's, and four scalars of the tree or of each leaf.

    `average` is the running sum of implied rates and `weight` its total weight; `rate`
    is the rate of SGD, 0 before the switch, and `base` the learning rate at the switch.
    The momentum of SGD lives in Adam's `mu`.
    """

    adam: Any
    average: Any
    weight: Any
    rate: Any
    base: Any


@catalogued(
    title="Improving Generalization Performance by Switching from Adam to SGD",
    arxiv="1712.07628",
    kind="optimizer",
    state="2 (Adam's moments; SGD's momentum takes the place of the first)",
    slots=2,
    variant="one inner product over the tree and one switch, as in the paper (public "
    "ports have one a tensor); the average of rates over its own weight; eps as optax.",
    compared="golden swats; optax.adam before the switch; closed form for a constant "
    "gradient",
    example=lambda: {"learning_rate": 0.01},
)
def swats(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    switch_tol: float = 1e-9,
    rel_tol: float = 0.0,
    scope: str = "global",
) -> optax.GradientTransformationExtraArgs:
    r"""Adam until the SGD rate it implies has settled, then SGD with momentum.

    With u the Adam step at learning rate eta, k = 1, 2, ... the step:

    .. math::
      \gamma_k = \frac{\langle u, u \rangle}{-\langle u, g \rangle}, \qquad
      L_k = \frac{\lambda_k}{1 - b_2^k}, \quad
      \lambda_k = b_2 \lambda_{k-1} + (1 - b_2) \gamma_k

    The step at which k > 1, L > 0 and :math:`|L - \gamma| < \text{switch\_tol} +
    \text{rel\_tol}\,|\gamma|` is the last of Adam. From then on

    .. math::
      v_k = b_1 v_{k-1} + g_k, \qquad
      x_k = x_{k-1} - (1 - b_1)\, L\, \frac{\eta_k}{\eta_\text{switch}}\, v_k

    Steps with :math:`\langle u, g \rangle = 0` count for no average. **The paper's
    tolerance of 1e-9 hardly ever fires**: users of public ports went to 1e-5. Watch
    ``state.rate``, which is 0 until the switch, or set `rel_tol`.

    Args:
      learning_rate: number or schedule, of the Adam phase; SGD follows its shape.
      b1: decay rate of the first moment and of SGD's momentum, in [0, 1).
      b2: decay rate of the second moment and of the average of rates, in [0, 1).
      eps: added to the root of the second moment, as in optax.
      switch_tol: absolute tolerance (the paper's).
      rel_tol: tolerance relative to the implied rate (ours; 1e-4 is a start).
      scope: "global" for one switch, or "per_leaf" for one a leaf.

    Returns:
      A finished optimizer, without decay.

    Raises:
      ValueError: for an unknown scope or hyper-parameters outside their range.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> tx, x = ox.swats(0.1, rel_tol=1e-3), jnp.zeros(2)
      >>> state, g = tx.init(x), jnp.array([1.0, 3.0])
      >>> for _ in range(2):
      ...     u, state = tx.update(g, state, x)
      >>> print(f"{state.rate:.3f}")  # 0.1 * 2 / (1 + 3)
      0.050
    """
    adam: Any = adam_direction("swats", b1, b2, eps, 0.0, None)
    check_hyperparam("swats", low=0.0, switch_tol=switch_tol, rel_tol=rel_tol)
    check_choice("swats", "scope", scope, ("global", "per_leaf"))
    if not callable(learning_rate):
        check_hyperparam("swats", low=0.0, learning_rate=learning_rate)

    def start(p):
        return tuple(jnp.zeros((), p.dtype) for _ in range(4))

    def init(params):
        if scope == "per_leaf":
            return SwatsState(adam.init(params), *init_leaves(start, params, 4))
        product = jax.eval_shape(inner_product, params, params)
        return SwatsState(adam.init(params), *start(product))

    def watch(phase, dd, dg, count):
        """The four scalars after a step, of <d, d> and <d, g> for u = -eta d."""
        average, weight, rate, base = phase
        eta = jnp.asarray(at_step(learning_rate, count.astype(dd.dtype)), dd.dtype)
        gamma = eta * dd / jnp.where(dg == 0, 1, dg)
        seen = (rate == 0) & (dg != 0) & jnp.isfinite(gamma)
        average = jnp.where(seen, b2 * average + (1 - b2) * gamma, average)
        weight = jnp.where(seen, b2 * weight + (1 - b2), weight)
        settled = average / jnp.where(weight > 0, weight, 1)
        close = jnp.abs(settled - gamma) < switch_tol + rel_tol * jnp.abs(gamma)
        now = seen & (count > 1) & (settled > 0) & close
        return average, weight, jnp.where(now, settled, rate), jnp.where(now, eta, base)

    def step(g, mu, direction, moment, before, after, count):
        """The step of one leaf, and what `mu` holds after it."""
        (*_, rate, base), (*_, switched, _) = before, after
        eta = at_step(learning_rate, count.astype(g.dtype))
        is_sgd = rate > 0
        v = b1 * mu + g
        sgd = (1 - b1) * rate * (eta / jnp.where(is_sgd, base, 1)) * v
        out = -jnp.where(is_sgd, sgd, eta * direction)
        return out, jnp.where(is_sgd, v, jnp.where(switched > 0, 0, moment))

    def update(updates, state, params=None, **extra):
        del extra
        directions, new = adam.update(updates, state.adam, params)
        slots, before = (state.adam.mu,), (*state[1:],)
        if scope == "per_leaf":
            slots, before, after = (*slots, *before), (), ()
        else:
            dd = inner_product(directions, directions)
            dg = inner_product(directions, updates)
            after = watch(before, dd, dg, new.count)

        def rule(g, slots, direction, moment):
            mu, *own = slots
            then = after
            if own:
                dd, dg = jnp.vdot(direction, direction), jnp.vdot(direction, g)
                then = watch(own, dd, dg, new.count)
            out, mu = step(g, mu, direction, moment, own or before, then, new.count)
            return out, (mu, *(then if own else ()))

        updates, (mu, *own) = map_leaves(rule, updates, slots, (directions, new.mu))
        return updates, SwatsState(new._replace(mu=mu), *(own or after))

    return full_precision(optax.GradientTransformationExtraArgs(init, update))
