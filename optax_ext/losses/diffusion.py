r"""How much each noise level counts in a diffusion model.

A latent is :math:`z = \alpha x + \sigma \epsilon` with :math:`\alpha^2 + \sigma^2 = 1`,
and its noise level is told by :math:`\mathrm{snr} = \alpha^2 / \sigma^2` or
:math:`\lambda = \log \mathrm{snr}`. Whatever the network puts out, its error is one
error:

.. math::
  |\epsilon - \hat\epsilon|^2 = \mathrm{snr}\, |x - \hat x|^2
  = \mathrm{sigmoid}(\lambda)\, |v - \hat v|^2, \qquad v = \alpha \epsilon - \sigma x.

So an objective is a weight over noise levels, and the rest is bookkeeping, which
`parameterization` does.

| function | noise level | weight of the eps error | when |
|---|---|---|---|
| `debiased_diffusion_weight` | given snr | 1 / sqrt(snr) | estimates of x must agree |
| `p2_diffusion_weight` | given snr | (k + snr)^-gamma | details are learnt first |
| `weighted_diffusion_loss` | any schedule | w(lambda), per unit of lambda | new work |

The first two multiply a plain loss over uniform time steps, so what they weigh depends
on the noise schedule too. `weighted_diffusion_loss` takes the schedule out: its
expectation depends on `diffusion_weighting` and the end points alone, and
`optax_ext.adaptive_noise_schedule` may choose where to look.
"""

import math
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_choice, check_hyperparam
from optax_ext.losses._batches import check_batch, per_example, sum_of_squares
from optax_ext.losses._numerics import working_floats

PARAMETERIZATIONS = ("eps", "x", "v")
KINDS = ("elbo", "sigmoid", "iddpm", "v_cosine", "fm_ot", "edm", "edm_monotonic")

WeightingFn = Callable[[jax.Array], jax.Array]

_ELBO = "Understanding Diffusion Objectives as the ELBO with Simple Data Augmentation"


def _exp(x: jax.Array) -> jax.Array:
    """An exponential that stays finite, so that a weight of 0 times it is 0."""
    return jnp.exp(jnp.minimum(x, math.log(float(jnp.finfo(x.dtype).max)) - 1))


@catalogued(
    title="Debias the Training of Diffusion Models",
    arxiv="2310.08442",
    kind="helper",
    needs=("snr",),
    variant="the paper's 1 / sqrt(snr) with the clamp of kohya-ss; the weight that "
    "kohya-ss puts on v losses is another",
    compared="golden `debiased_diffusion_weight`",
    example=lambda: {"snr": jnp.array([0.25, 1.0, 4.0])},
)
def debiased_diffusion_weight(
    snr: chex.Array,
    *,
    max_snr: chex.Numeric = 1000.0,
    parameterization: str = "eps",
) -> jax.Array:
    r"""Weight under which all noise levels have an equal say in the estimate of x.

    .. math::
      s = \min(\mathrm{snr}, s_{max}), \qquad
      w_\epsilon = 1/\sqrt s, \quad w_x = \sqrt s, \quad w_v = \sqrt s / (1 + s).

    It is the geometric mean of a constant weight on the eps error and a constant weight
    on the x error, 1 and 1 / snr.

    Args:
      snr: alpha^2 / sigma^2; any shape. Infinity, a clean example, is fine because of
        the clamp. At 0, pure noise, the weight of the eps error is infinite: a schedule
        should end above.
      max_snr: s_max > 0. 1000 as in kohya-ss; infinity is the paper's own code.
      parameterization: whose error the weight multiplies, "eps", "x" or "v". Below
        `max_snr` the three make one objective.

    Returns:
      Weights of the shape of `snr`.

    Raises:
      AssertionError: if `snr` are not floats.
      ValueError: for an unknown `parameterization` or a `max_snr` that is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> snr = jnp.array([0.25, 1.0, 4.0])
      >>> print(ox.losses.debiased_diffusion_weight(snr))
      [2.  1.  0.5]
      >>> print(ox.losses.debiased_diffusion_weight(snr, parameterization="x"))
      [0.5 1.  2. ]
    """
    owner = "debiased_diffusion_weight"
    check_choice(owner, "parameterization", parameterization, PARAMETERIZATIONS)
    check_hyperparam(owner, low=0.0, open_low=True, max_snr=max_snr)
    (snr,) = working_floats(snr=snr)
    snr = jnp.minimum(snr, jnp.asarray(max_snr, snr.dtype))
    root = jnp.sqrt(snr)
    return {"eps": 1 / root, "x": root, "v": root / (1 + snr)}[parameterization]


@catalogued(
    title="Perception Prioritized Training of Diffusion Models",
    arxiv="2204.00227",
    kind="helper",
    needs=("snr",),
    variant="as in the official code, also for x and v errors",
    compared="golden `p2_diffusion_weight`; 1 - alpha_bar at k = gamma = 1",
    example=lambda: {"snr": jnp.array([0.25, 1.0, 4.0])},
)
def p2_diffusion_weight(
    snr: chex.Array,
    *,
    k: chex.Numeric = 1.0,
    gamma: chex.Numeric = 1.0,
    parameterization: str = "eps",
) -> jax.Array:
    r"""Weight that plays down the nearly clean noise levels.

    .. math::
      w_\epsilon = (k + \mathrm{snr})^{-\gamma}, \quad
      w_x = \mathrm{snr}\, w_\epsilon, \quad
      w_v = \frac{\mathrm{snr}}{1 + \mathrm{snr}} w_\epsilon.

    With k = gamma = 1, :math:`w_\epsilon = 1 - \bar\alpha = \sigma^2`.

    Args:
      snr: alpha_bar / (1 - alpha_bar); any shape, 0 and infinity included.
      k: bounds the weight by k^-gamma at pure noise; positive, 1 in the paper.
      gamma: 0 or more; 0.5 and 1 in the paper, and 0 is the plain loss.
      parameterization: whose error the weight multiplies, "eps", "x" or "v".

    Returns:
      Weights of the shape of `snr`.

    Raises:
      AssertionError: if `snr` are not floats.
      ValueError: for an unknown `parameterization`, a `k` that is not positive or a
        negative `gamma`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> alpha_bar = jnp.array([0.25, 0.5, 0.75])
      >>> print(ox.losses.p2_diffusion_weight(alpha_bar / (1 - alpha_bar)))
      [0.75 0.5  0.25]
    """
    owner = "p2_diffusion_weight"
    check_choice(owner, "parameterization", parameterization, PARAMETERIZATIONS)
    check_hyperparam(owner, low=0.0, open_low=True, k=k)
    check_hyperparam(owner, low=0.0, gamma=gamma)
    (snr,) = working_floats(snr=snr)
    k, gamma = (jnp.asarray(h, snr.dtype) for h in (k, gamma))
    # A clean example gets the limit, where infinity would make 0 * inf of it.
    snr = jnp.minimum(snr, 1e30)
    factors = {"eps": jnp.ones_like(snr), "x": snr, "v": snr / (1 + snr)}
    return (k + snr) ** -gamma * factors[parameterization]


def _edm_maximiser(mean: float, std: float, sigma_data: float) -> float:
    """Where the weight "edm" is largest: the root of its logarithm's derivative."""

    def slope(logsnr: float) -> float:
        return -(logsnr - mean) / std**2 - 1 / (1 + sigma_data**2 * math.exp(logsnr))

    # All stationary points lie in here, for a large std up to three: start at the best.
    grid = np.linspace(mean - std**2, mean, 4097)
    log_weight = -(((grid - mean) / std) ** 2) / 2
    log_weight += np.logaddexp(-grid, 2 * math.log(sigma_data))
    best = int(log_weight.argmax())
    low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, 4096)])
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return (low + high) / 2


@catalogued(
    title=_ELBO,
    arxiv="2303.00848",
    kind="helper",
    variant="weights of the eps error per unit of log-SNR, as in the paper's table; "
    "'edm' with the constant of the normal density",
    compared="golden `diffusion_weighting`; each re-derived from its objective",
    example=lambda: {"kind": "sigmoid"},
)
def diffusion_weighting(
    kind: str | WeightingFn = "sigmoid",
    *,
    bias: float = 2.0,
    mean: float = 2.4,
    std: float = 2.4,
    sigma_data: float = 0.5,
) -> WeightingFn:
    r"""Weighting w(lambda) of the log-SNRs that a known training objective implies.

    ================  ===========================================================
    kind              w(lambda)
    ================  ===========================================================
    "elbo"            1: the likelihood bound
    "sigmoid"         sigmoid(bias - lambda)
    "iddpm"           sech(lambda / 2): plain eps loss on the cosine schedule
    "v_cosine"        exp(-lambda / 2): plain v loss on the cosine schedule
    "fm_ot"           exp(-lambda / 2): flow matching on straight paths
    "edm"             N(lambda; mean, std^2) (exp(-lambda) + sigma_data^2)
    "edm_monotonic"   "edm" at max(lambda, lambda*), lambda* its maximiser
    ================  ===========================================================

    A weighting that does not increase with lambda makes the loss a likelihood bound of
    data with noise added: all of these but "iddpm" and "edm".

    Args:
      kind: a name of the table. A function lambda -> w is returned as it is.
      bias: where the sigmoid falls; 2 in the paper. Only "sigmoid" reads it.
      mean: of the normal density; the default and the next are those of EDM's noise,
        log sigma ~ N(-1.2, 1.2^2). Only the "edm" kinds read them.
      std: of the normal density, positive.
      sigma_data: standard deviation of the data in EDM, positive.

    Returns:
      A function of log-SNRs of any shape that returns weights of that shape.

    Raises:
      ValueError: for an unknown `kind`, or a `std` or `sigma_data` that is not
        positive.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> weight = ox.losses.diffusion_weighting("sigmoid")
      >>> print(weight(jnp.array([-8.0, 2.0, 12.0])).round(3))
      [1.  0.5 0. ]
    """
    if callable(kind):
        return kind
    owner = "diffusion_weighting"
    check_choice(owner, "kind", kind, KINDS)
    check_hyperparam(owner, bias=bias, mean=mean)
    check_hyperparam(owner, low=0.0, open_low=True, std=std, sigma_data=sigma_data)

    def edm(logsnr: jax.Array) -> jax.Array:
        log_density = -(((logsnr - mean) / std) ** 2) / 2
        log_density -= math.log(std) + math.log(2 * math.pi) / 2
        floor = jnp.full_like(logsnr, 2 * math.log(sigma_data))
        return jnp.exp(log_density + jnp.logaddexp(-logsnr, floor))

    def sech_of_half(logsnr: jax.Array) -> jax.Array:
        log_product = jax.nn.log_sigmoid(logsnr) + jax.nn.log_sigmoid(-logsnr)
        return 2 * jnp.exp(log_product / 2)

    best = _edm_maximiser(mean, std, sigma_data) if kind == "edm_monotonic" else 0.0
    rules: dict[str, WeightingFn] = {
        "elbo": jnp.ones_like,
        "sigmoid": lambda logsnr: jax.nn.sigmoid(bias - logsnr),
        "iddpm": sech_of_half,
        "v_cosine": lambda logsnr: _exp(-logsnr / 2),
        "fm_ot": lambda logsnr: _exp(-logsnr / 2),
        "edm": edm,
        "edm_monotonic": lambda logsnr: edm(jnp.maximum(logsnr, best)),
    }

    def weight(logsnr: jax.Array) -> jax.Array:
        (logsnr,) = working_floats(logsnr=logsnr)
        return rules[kind](logsnr)

    return weight


@catalogued(
    title=_ELBO,
    arxiv="2303.00848",
    kind="loss",
    needs=("pred", "target", "logsnr", "dlogsnr_dt"),
    variant="the continuous-time loss of VDM with a weighting, for eps, x and v",
    compared="golden `weighted_diffusion_loss`; equal expectations under two schedules",
    example=lambda: {
        "pred": jnp.array([[0.1, 0.2], [0.3, -0.4], [1.0, 0.0]]),
        "target": jnp.array([[0.0, 0.5], [0.2, -0.1], [0.8, 0.3]]),
        "logsnr": jnp.array([3.0, 0.5, -2.0]),
        "dlogsnr_dt": jnp.array([-9.0, -6.0, -7.0]),
    },
)
def weighted_diffusion_loss(
    pred: chex.Array,
    target: chex.Array,
    logsnr: chex.Numeric,
    dlogsnr_dt: chex.Numeric,
    *,
    weighting: str | WeightingFn = "elbo",
    parameterization: str = "eps",
) -> jax.Array:
    r"""Diffusion loss as an integral over log-SNR, whatever the noise schedule.

    .. math::
      \ell = \tfrac{1}{2}\, w(\lambda) \left(-\frac{d\lambda}{dt}\right)
      c\, |\hat y - y|^2, \qquad
      c = 1 \;(\epsilon),\; e^\lambda \;(x),\; \mathrm{sigmoid}(\lambda) \;(v)

    with t uniform on [0, 1]. Its expectation depends on the weighting and on the end
    points of the schedule, not on what is between: with "elbo" it is the diffusion part
    of the negative likelihood bound, in nats.

    Args:
      pred: the network's output, [batch, ...], in the named parameterization.
      target: eps, x, or v = alpha eps - sigma x, of the same shape.
      logsnr: lambda at each example's t, [batch] or a scalar; decreasing in t.
      dlogsnr_dt: its time derivative, negative, [batch] or a scalar: `jax.jvp` of the
        schedule. The derivative of a learned schedule is differentiated, too.
      weighting: a kind of `diffusion_weighting` with its defaults, or a function
        lambda -> w; "elbo" weighs every log-SNR alike.
      parameterization: "eps", "x" or "v", what `pred` and `target` are.

    Returns:
      Losses [batch], sums over the axes of an example.

    Raises:
      AssertionError: for shapes that do not fit, or arguments that are not floats.
      ValueError: for an unknown `weighting` or `parameterization`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import optax_ext as ox
      >>> schedule = lambda t: 8.0 - 16.0 * t
      >>> t = jnp.array([0.25, 0.5, 0.75])
      >>> logsnr, slope = jax.jvp(schedule, (t,), (jnp.ones_like(t),))
      >>> pred, eps = jnp.zeros((3, 2)), jnp.full((3, 2), 0.5)
      >>> print(ox.losses.weighted_diffusion_loss(
      ...     pred, eps, logsnr, slope, weighting="sigmoid").round(2))
      [0.48 3.52 3.99]
    """
    owner = "weighted_diffusion_loss"
    check_choice(owner, "parameterization", parameterization, PARAMETERIZATIONS)
    weight_of = diffusion_weighting(weighting)
    pred, target, logsnr, dlogsnr_dt = working_floats(
        pred=pred, target=target, logsnr=logsnr, dlogsnr_dt=dlogsnr_dt
    )
    check_batch("pred", pred)
    chex.assert_equal_shape([pred, target], custom_message="pred, target")
    logsnr, dlogsnr_dt = per_example(len(pred), logsnr=logsnr, dlogsnr_dt=dlogsnr_dt)

    factors = {"x": _exp, "v": jax.nn.sigmoid, "eps": jnp.ones_like}
    weight = weight_of(logsnr) * factors[parameterization](logsnr)
    return -weight * dlogsnr_dt * sum_of_squares(pred - target) / 2
