"""Weight decay that does not scale with the learning rate.

In the paper of AdamW, decay is multiplied by a schedule and not by the learning rate:
tuning the rate leaves the strength of decay alone. `optax.adamw` multiplies it by both.
`add_independent_weight_decay` is that decay as a link, to be put behind the learning
rate of any chain; `adamw_decoupled` and `sgdw` are the paper's two optimizers.
"""

from typing import Any, NamedTuple

import jax
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam, check_rate
from optax_ext._core.leaves import at_step, leafwise
from optax_ext._core.optimizers import adam_direction
from optax_ext._core.views import full_precision

_TITLE = "Decoupled Weight Decay Regularization"
_ARXIV = "1711.05101"


class IndependentDecayState(NamedTuple):
    """State of `add_independent_weight_decay` with a schedule."""

    count: jax.Array


@catalogued(
    title=_TITLE,
    arxiv=_ARXIV,
    kind="link",
    needs=("params",),
    slots=0,
    variant="decay behind the learning rate, on negated updates.",
    compared="goldens adamw_decoupled, sgdw; closed form for a zero gradient",
    example=lambda: {"weight_decay": 1e-4},
    terminal=True,
)
def add_independent_weight_decay(
    weight_decay: optax.ScalarOrSchedule, mask: Any = None
) -> optax.GradientTransformationExtraArgs:
    r"""Decay that is not multiplied by the learning rate.

    .. math:: \text{out} = u - \lambda_t x

    Place it behind `optax.scale_by_learning_rate`, where updates are negated already:
    whatever is put behind it scales the decay too.

    Args:
      weight_decay: fraction of a parameter that is taken off at each step, or a
        schedule of it. A good rate is far below `optax.adamw`'s, which is multiplied by
        the learning rate.
      mask: which leaves decay: tree of booleans, or function of params.

    Returns:
      A link without state, or with a count where `weight_decay` is a schedule.

    Raises:
      ValueError: if `update` is called without params.

    Example:
      >>> import jax.numpy as jnp, optax, optax_ext as ox
      >>> tx = optax.chain(
      ...     optax.scale_by_adam(),
      ...     optax.scale_by_learning_rate(1e-3),
      ...     ox.add_independent_weight_decay(1e-4),
      ... )
    """
    check_hyperparam("add_independent_weight_decay", weight_decay=weight_decay)

    def init(x):
        del x
        return ()

    def update(u, slots, x, t):
        return u - at_step(weight_decay, t) * x, slots

    state_type = IndependentDecayState if callable(weight_decay) else optax.EmptyState
    link = leafwise(state_type, init, update, needs_params=True)
    return link if mask is None else optax.masked(link, mask)


def _times(rate: Any, schedule: Any) -> Any:
    """The product of two numbers or schedules."""
    if not callable(rate) and not callable(schedule):
        return rate * schedule

    def product(count):
        t = (count + 1).astype(float)
        return at_step(rate, t) * at_step(schedule, t)

    return product


def _check_rates(owner: str, weight_decay: Any, **rates: Any) -> None:
    check_hyperparam(owner, low=0.0, **rates)
    check_hyperparam(owner, weight_decay=weight_decay)


@catalogued(
    title=_TITLE,
    arxiv=_ARXIV,
    kind="optimizer",
    needs=("params",),
    state="2 (Adam's moments)",
    slots=2,
    variant="the paper's: decay is multiplied by the schedule, not by the learning "
    "rate; optax.adamw multiplies it by both.",
    compared="golden adamw_decoupled; optax.adamw at weight_decay / learning_rate",
    example=lambda: {"learning_rate": 0.01},
)
def adamw_decoupled(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: Any = None,
    weight_decay: float = 1e-4,
    mask: Any = None,
    *,
    schedule: optax.ScalarOrSchedule = 1.0,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW as in its paper: the learning rate does not scale the decay.

    .. math:: x_t = x_{t-1} - \eta_t (\alpha u_t + \lambda x_{t-1})

    with u Adam's direction. Warm restarts: ``schedule=optax.sgdr_schedule(...)``.

    Args:
      learning_rate: alpha, the size of the step (paper: a number; a schedule here moves
        the step and leaves the decay).
      b1: decay rate of the first moment, in [0, 1) (paper).
      b2: decay rate of the second moment, in [0, 1) (paper).
      eps: added to the root of the second moment (paper).
      eps_root: added under the root.
      mu_dtype: dtype of the first moment; None keeps float32.
      weight_decay: lambda, multiplied by the schedule alone. 1e-4 is ours; the paper
        gives none, see `normalized_weight_decay`.
      mask: which leaves decay, as in `optax.add_decayed_weights`.
      schedule: eta, a number or a schedule that multiplies step and decay.

    Returns:
      A finished optimizer.

    Raises:
      ValueError: for hyper-parameters outside their range; if `update` is called
        without params.

    Example:
      >>> import optax, optax_ext as ox
      >>> decay = optax.cosine_decay_schedule(1.0, decay_steps=1000)
      >>> tx = ox.adamw_decoupled(1e-3, weight_decay=1e-3, schedule=decay)
    """
    owner = "adamw_decoupled"
    _check_rates(owner, weight_decay, learning_rate=learning_rate, schedule=schedule)
    return full_precision(
        optax.chain(
            adam_direction(owner, b1, b2, eps, eps_root, mu_dtype),
            optax.scale_by_learning_rate(_times(learning_rate, schedule)),
            add_independent_weight_decay(_times(weight_decay, schedule), mask),
        )
    )


@catalogued(
    title=_TITLE,
    arxiv=_ARXIV,
    kind="optimizer",
    needs=("params",),
    state="1 (momentum)",
    slots=1,
    variant="the paper's: the schedule is inside the momentum; the authors' Lua code "
    "has it outside, which differs once the schedule moves.",
    compared="golden sgdw; positions by hand",
    example=lambda: {"learning_rate": 0.01},
)
def sgdw(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    mask: Any = None,
    *,
    schedule: optax.ScalarOrSchedule = 1.0,
) -> optax.GradientTransformationExtraArgs:
    r"""SGD with momentum and decay that the learning rate does not scale.

    .. math::
      m_t = \mu m_{t-1} + \eta_t \alpha g_t, \qquad
      x_t = x_{t-1} - m_t - \eta_t \lambda x_{t-1}

    Where the schedule falls to 0, the old momentum still moves the parameters.

    Args:
      learning_rate: alpha, the size of the step (paper: a number; a schedule here moves
        the step and leaves the decay).
      momentum: mu, in [0, 1).
      weight_decay: lambda, multiplied by the schedule alone. 1e-4 is ours; the paper
        gives none, see `normalized_weight_decay`.
      mask: which leaves decay, as in `optax.add_decayed_weights`.
      schedule: eta, a number or a schedule that multiplies gradient and decay.

    Returns:
      A finished optimizer.

    Raises:
      ValueError: for hyper-parameters outside their range; if `update` is called
        without params.

    Example:
      >>> import optax, optax_ext as ox
      >>> tx = ox.sgdw(0.1, weight_decay=5e-4)
    """
    _check_rates("sgdw", weight_decay, learning_rate=learning_rate, schedule=schedule)
    check_rate("sgdw", momentum=momentum)
    rate = _times(learning_rate, schedule)
    return full_precision(
        optax.chain(
            optax.scale_by_learning_rate(rate, flip_sign=False),
            optax.trace(momentum),
            optax.scale(-1.0),
            add_independent_weight_decay(_times(weight_decay, schedule), mask),
        )
    )


@catalogued(
    title=_TITLE,
    arxiv=_ARXIV,
    kind="helper",
    variant="the paper's, over the number of steps of the whole training.",
    compared="closed form",
    example=lambda: {
        "lambda_norm": 0.05,
        "batch_size": 128,
        "dataset_size": 50_000,
        "epochs": 100,
    },
)
def normalized_weight_decay(
    lambda_norm: float, batch_size: int, dataset_size: int, epochs: float
) -> float:
    r"""The decay to use for a given length of training.

    .. math:: \lambda = \lambda_\text{norm} \sqrt{\frac{B}{N T}}

    Args:
      lambda_norm: strength of decay that does not depend on the length of training.
      batch_size: B, examples a step.
      dataset_size: N, examples an epoch.
      epochs: T, passes over the data.

    Returns:
      The `weight_decay` of `adamw_decoupled` or `sgdw`.

    Raises:
      ValueError: for a size or number of epochs that is not above 0.

    Example:
      >>> import optax_ext as ox
      >>> print(f"{ox.normalized_weight_decay(0.05, 128, 50_000, 100):.4e}")
      2.5298e-04
    """
    owner = "normalized_weight_decay"
    sizes = {"batch_size": batch_size, "dataset_size": dataset_size, "epochs": epochs}
    check_hyperparam(owner, low=0.0, open_low=True, **sizes)
    check_hyperparam(owner, low=0.0, lambda_norm=lambda_norm)
    return lambda_norm * (batch_size / (dataset_size * epochs)) ** 0.5
