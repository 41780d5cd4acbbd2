"""Weight decay beyond optax's: decay that asks the direction first."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam
from optax_ext._core.leaves import at_step, leafwise
from optax_ext._core.optimizers import adam_direction, finish
from optax_ext.transforms.sign import scale_by_lion_k


class CautiousDecayState(NamedTuple):
    """State of `add_cautious_decayed_weights` with a schedule."""

    count: jax.Array


@catalogued(
    title="Cautious Weight Decay",
    arxiv="2510.12402",
    kind="link",
    needs=("params",),
    slots=0,
    variant="the paper's u x >= 0: where u = 0 the entry decays in full.",
    compared="goldens adamw_cwd, lion_cwd; closed form on a quadratic",
)
def add_cautious_decayed_weights(
    weight_decay: optax.ScalarOrSchedule = 0.1, mask: Any = None
) -> optax.GradientTransformationExtraArgs:
    r"""Decay only where decay pulls the way the update already goes.

    .. math:: \text{out} = u + \lambda\, 1[u x \ge 0]\, x

    The stationary points stay those of the plain loss, which ordinary decay shifts.
    Place it between the direction and the learning rate, where u is un-negated.

    Args:
      weight_decay: rate, or a schedule of it; multiplied by the learning rate that
        follows. 0.1 is the usual rate for language models (the paper keeps the base
        optimizer's).
      mask: which leaves decay: tree of booleans, or function of params.

    Returns:
      A link without state, or with a count where `weight_decay` is a schedule.

    Raises:
      ValueError: if `update` is called without params.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> tx = ox.add_cautious_decayed_weights(0.1)
      >>> x = jnp.array([1.0, -1.0, 2.0])
      >>> print(tx.update(jnp.array([0.5, 0.5, -0.5]), tx.init(x), x)[0])
      [ 0.6  0.5 -0.5]
    """
    check_hyperparam("add_cautious_decayed_weights", weight_decay=weight_decay)

    def init(x):
        del x
        return ()

    def update(u, slots, x, t):
        # Signs, not u * x: a product of tiny numbers underflows to 0.
        aligned = jnp.sign(u) * jnp.sign(x) >= 0
        return u + at_step(weight_decay, t) * jnp.where(aligned, x, 0), slots

    state_type = CautiousDecayState if callable(weight_decay) else optax.EmptyState
    link = leafwise(state_type, init, update, needs_params=True)
    return link if mask is None else optax.masked(link, mask)


@catalogued(
    title="Cautious Weight Decay",
    arxiv="2510.12402",
    kind="optimizer",
    needs=("params",),
    state="2 (Adam's moments)",
    slots=2,
    variant="the paper's u x >= 0 on Adam's bias-corrected direction.",
    compared="golden adamw_cwd",
    example=lambda: {"learning_rate": 0.01},
)
def adamw_cwd(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 0.1,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW with cautious weight decay.

    .. math:: x_t = x_{t-1} - \eta_t (u_t + \lambda\, 1[u_t x_{t-1} \ge 0]\, x_{t-1})

    Args:
      learning_rate: number or schedule.
      b1: decay rate of the first moment, in [0, 1); Adam's default.
      b2: decay rate of the second moment, in [0, 1); Adam's default.
      eps: added to the root of the second moment.
      eps_root: added under the root.
      mu_dtype: dtype of the first moment; None keeps float32.
      weight_decay: rate or schedule, multiplied by the learning rate.
      mask: which leaves decay.

    Returns:
      A finished optimizer.

    Example:
      >>> import optax_ext as ox
      >>> tx = ox.adamw_cwd(3e-4)
    """
    return finish(
        adam_direction("adamw_cwd", b1, b2, eps, eps_root, mu_dtype),
        add_cautious_decayed_weights(weight_decay, mask),
        learning_rate=learning_rate,
        owner="adamw_cwd",
    )


@catalogued(
    title="Cautious Weight Decay",
    arxiv="2510.12402",
    kind="optimizer",
    needs=("params",),
    state="1 (momentum)",
    slots=1,
    variant="the paper's u x >= 0 on Lion's sign.",
    compared="golden lion_cwd",
    example=lambda: {"learning_rate": 0.01},
)
def lion_cwd(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.99,
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 0.1,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Lion with cautious weight decay.

    .. math:: x_t = x_{t-1} - \eta_t (u_t + \lambda\, 1[u_t x_{t-1} \ge 0]\, x_{t-1})

    Args:
      learning_rate: number or schedule.
      b1: weight of the old momentum in the step, in [0, 1); Lion's default.
      b2: decay rate of the stored momentum, in [0, 1); Lion's default.
      mu_dtype: dtype of the stored momentum; None keeps float32.
      weight_decay: rate or schedule, multiplied by the learning rate.
      mask: which leaves decay.

    Returns:
      A finished optimizer.

    Example:
      >>> import optax_ext as ox
      >>> tx = ox.lion_cwd(1e-4)
    """
    return finish(
        scale_by_lion_k(b1, b2, mu_dtype=mu_dtype),
        add_cautious_decayed_weights(weight_decay, mask),
        learning_rate=learning_rate,
        owner="lion_cwd",
    )
