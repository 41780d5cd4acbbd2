"""Schedules that go with optimizers optax has: warm-ups and step sizes of their papers.

All take optax's 0-based count; t = count + 1 in the formulas.
"""

import math

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam, check_interval, check_rate

_ADEMAMIX = "The AdEMAMix Optimizer: Better, Faster, Older"


def _step(count: jax.typing.ArrayLike) -> jax.Array:
    """Step t in the default float: an int32 over an int would be float32."""
    return jnp.asarray(count, float) + 1


@catalogued(
    title=_ADEMAMIX,
    arxiv="2409.03137",
    kind="schedule",
    variant="counts from 1, as the paper and both PyTorch files; the authors' optax "
    "file counts from 0.",
    compared="golden ademamix",
    example=lambda: {"warmup_steps": 100},
)
def ademamix_b3_schedule(
    b1: float = 0.9, b3: float = 0.9999, *, warmup_steps: int
) -> optax.Schedule:
    r"""Warm up AdEMAMix's slow decay rate: half-lives grow linearly from b1's to b3's.

    .. math::
      b_{3,t} = \exp\left( \frac{1}{(1 - \mu) / \ln b_1 + \mu / \ln b_3} \right), \qquad
      \mu = \min(t / T, 1)

    Args:
      b1: the optimizer's own b1, in [0, 1); the rate that the warm-up starts from.
      b3: rate after the warm-up, in (0, 1) (optax.contrib.ademamix's default).
      warmup_steps: T; the paper warms up over all steps.

    Returns:
      A schedule for ``optax.contrib.ademamix(b3=...)``.

    Raises:
      ValueError: for rates outside their range or `warmup_steps` below 1.

    Example:
      >>> import optax_ext as ox
      >>> b3 = ox.ademamix_b3_schedule(warmup_steps=1000)
      >>> print(f"{b3(0):.5f} {b3(999):.5f}")
      0.94996 0.99990
    """
    check_rate("ademamix_b3_schedule", b1=b1)
    check_hyperparam(
        "ademamix_b3_schedule", low=0.0, high=1.0, open_low=True, open_high=True, b3=b3
    )
    check_interval("ademamix_b3_schedule", warmup_steps=warmup_steps)
    # Logarithms at construction, in float64: that of 0.9999 in float32 is 3e-4 off.
    fast, slow = 1 / math.log(b1) if b1 > 0 else 0.0, 1 / math.log(b3)

    def schedule(count):
        mu = jnp.minimum(_step(count) / warmup_steps, 1)
        return jnp.where(mu < 1, jnp.exp(1 / ((1 - mu) * fast + mu * slow)), b3)

    return schedule


@catalogued(
    title=_ADEMAMIX,
    arxiv="2409.03137",
    kind="schedule",
    variant="counts from 1, as the paper and both PyTorch files; the authors' optax "
    "file counts from 0.",
    compared="golden ademamix",
    example=lambda: {"warmup_steps": 100},
)
def ademamix_alpha_schedule(alpha: float = 5.0, *, warmup_steps: int) -> optax.Schedule:
    r"""Warm up the weight of AdEMAMix's slow average linearly.

    .. math:: \alpha_t = \alpha \min(t / T, 1)

    Args:
      alpha: weight after the warm-up, 0 or more (optax.contrib.ademamix's default).
      warmup_steps: T; the paper warms up over all steps.

    Returns:
      A schedule for ``optax.contrib.ademamix(alpha=...)``.

    Raises:
      ValueError: for a negative `alpha` or `warmup_steps` below 1.

    Example:
      >>> import optax_ext as ox
      >>> alpha = ox.ademamix_alpha_schedule(warmup_steps=1000)
      >>> print(f"{alpha(0):.3f} {alpha(499):.3f} {alpha(5000):.3f}")
      0.005 2.500 5.000
    """
    check_hyperparam("ademamix_alpha_schedule", low=0.0, alpha=alpha)
    check_interval("ademamix_alpha_schedule", warmup_steps=warmup_steps)
    return lambda count: alpha * jnp.minimum(_step(count) / warmup_steps, 1)


@catalogued(
    title="On the Variance of the Adaptive Learning Rate and Beyond",
    arxiv="1908.03265",
    kind="schedule",
    variant="no step at all while rho is below the threshold, the official class's "
    "default; optax.radam takes the un-adapted momentum step there.",
    compared="golden rectification_schedule; golden radam for optax.radam",
)
def rectification_schedule(b2: float = 0.999, threshold: float = 5.0) -> optax.Schedule:
    r"""RAdam's rectification of the adaptive learning rate, as a schedule.

    .. math::
      \rho_\infty = \frac{2}{1 - b_2} - 1, \qquad
      \rho_t = \rho_\infty - \frac{2 t\, b_2^t}{1 - b_2^t}, \qquad
      r_t = \sqrt{\frac{(\rho_t - 4)(\rho_t - 2)\, \rho_\infty}
                       {(\rho_\infty - 4)(\rho_\infty - 2)\, \rho_t}}

    where :math:`\rho_t` reaches the threshold, and 0 before. Chain
    ``optax.scale_by_schedule`` of it behind ``optax.scale_by_adam`` with the same b2.

    Args:
      b2: the optimizer's own b2, in (2/3, 1) at the default threshold.
      threshold: smallest rho to move at, 4 or more (the paper: 4; official code and
        optax: 5).

    Returns:
      A schedule with values in [0, 1).

    Raises:
      ValueError: where rho never reaches the threshold, or for a threshold below 4.

    Example:
      >>> import optax_ext as ox
      >>> r = ox.rectification_schedule()
      >>> print(f"{r(4):.2f} {r(9):.4f} {r(10_000):.4f}")
      0.00 0.0490 0.9998
    """
    owner = "rectification_schedule"
    check_hyperparam(owner, low=0.0, high=1.0, open_low=True, open_high=True, b2=b2)
    check_hyperparam(owner, low=4.0, threshold=threshold)
    infinity = 2 / (1 - b2) - 1
    if infinity <= threshold:
        raise ValueError(
            f"{owner}: with b2 = {b2} rho stays below {infinity:.3g} and never passes "
            f"threshold = {threshold}: take b2 above 2/3"
        )
    log_b2 = math.log(b2)

    def schedule(count):
        t = _step(count)
        # b2^t / (1 - b2^t) by expm1: in float32 the difference would be off by 6e-5.
        rho = infinity - 2 * t / jnp.expm1(-t * log_b2)
        adapted = rho >= threshold
        seen = jnp.where(adapted, rho, infinity)  # no negative number under the root
        ratio = (seen - 4) * (seen - 2) / ((infinity - 4) * (infinity - 2))
        return jnp.where(adapted, jnp.sqrt(ratio * (infinity / seen)), 0)

    return schedule


@catalogued(
    title="Adafactor: Adaptive Learning Rates with Sublinear Memory Cost",
    arxiv="1804.04235",
    kind="schedule",
    variant="the paper's relative step; the cap is an argument.",
    compared="golden adafactor_relative_step",
)
def relative_step_schedule(
    max_step: float = 1e-2, warmup_init: bool = False
) -> optax.Schedule:
    r"""Adafactor's relative step size, which optax.adafactor lacks.

    .. math:: \eta_t = \min(\text{max\_step}, 1 / \sqrt t) \quad \text{or, with
      warm-up,} \quad \min(10^{-6}\, t, 1 / \sqrt t)

    Give it to ``optax.adafactor(learning_rate=...)``, which multiplies by max(1e-3,
    RMS of the parameters) on top. Three things to know of optax.adafactor: it factors
    only where two axes are 128 or longer (``min_dim_size_to_factor``), and then the two
    longest; its decay rate 1 - t^-0.8 is float32 even for float64 parameters; its
    ``weight_decay_rate`` is not multiplied by the learning rate.

    Args:
      max_step: largest step, above 0 (paper).
      warmup_init: whether the step starts at 1e-6 and grows linearly; `max_step` has
        no effect then.

    Returns:
      A schedule.

    Raises:
      ValueError: for a `max_step` that is not above 0.

    Example:
      >>> import optax_ext as ox
      >>> step = ox.relative_step_schedule()
      >>> print(f"{step(0):.4f} {step(39_999):.4f}")
      0.0100 0.0050
    """
    check_hyperparam(
        "relative_step_schedule", low=0.0, open_low=True, max_step=max_step
    )

    def schedule(count):
        t = _step(count)
        return jnp.minimum(1e-6 * t if warmup_init else max_step, 1 / jnp.sqrt(t))

    return schedule
