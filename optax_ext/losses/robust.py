r"""Weights from losses: look harder at some examples, by how badly they do.

| function | weight of example i | when |
|---|---|---|
| `kl_dro_weights` | rises with its loss | the hard examples matter most |
| `loreun_weights` | falls with its loss | unlearning: what is known best resists most |
| `road_weights` | falls with an adversary's loss | the group shows there |

All are a softmax of :math:`\pm l / T`, scaled to mean 1: over the batch, or within each
sensitive group (`road_weights`). `kl_dro_loss` is the loss whose gradient has the first
of them, `road_loss` the one that uses the last. Weights from a batch are those of a
larger batch only on average; `optax_ext.compositional_kl_dro` remembers the normaliser.
Weights with a bounded range, for pretraining, are `loss_based_weights`.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam, check_interval
from optax_ext.losses._numerics import mask_of, masked_mean, working_floats

_KL_DRO: dict[str, Any] = {
    "title": "Doubly Robust Instance-Reweighted Adversarial Training",
    "arxiv": "2308.00311",
}
_ROAD: dict[str, Any] = {
    "title": "On the Fairness ROAD: Robust Optimization for Adversarial Debiasing",
    "arxiv": "2310.18413",
    "variant": "the closed form (BROAD). ROAD itself learns exp(-a/T) with a network.",
    "compared": "golden `road`",
}


def check_temperature(owner: str, temperature: chex.Numeric) -> None:
    """Check that a temperature is positive and finite."""
    bounds: dict[str, Any] = {"low": 0.0, "high": float("inf")}
    check_hyperparam(
        owner, open_low=True, open_high=True, temperature=temperature, **bounds
    )


def log_mean_exp(x: jax.Array, where: chex.Array | None = None) -> jax.Array:
    """The log of the mean of exp(x), for x of at most 0; 0 of nothing.

    Where the mean is near 1, through expm1: at high temperatures the difference from 0
    is all there is.
    """
    less_one = masked_mean(jnp.expm1(x), where)
    near = less_one > -0.5
    mean = jnp.where(near, 1, masked_mean(jnp.exp(x), where))
    return jnp.where(near, jnp.log1p(jnp.where(near, less_one, 0)), jnp.log(mean))


def tempered(
    losses: jax.Array, temperature: chex.Numeric, where: chex.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The losses less the largest of them, over T; the largest; T in their dtype.

    Losses that do not count give 0. The largest carries no gradient.
    """
    chex.assert_rank(
        losses, 1, custom_message="losses must be a vector, one value an example"
    )
    counts = mask_of(where, losses) > 0
    largest = jnp.max(losses, initial=-jnp.inf, where=counts)
    largest = jax.lax.stop_gradient(jnp.where(jnp.any(counts), largest, 0))
    t = jnp.asarray(temperature, losses.dtype)
    return (jnp.where(counts, losses, largest) - largest) / t, largest, t


@catalogued(
    **_KL_DRO,
    kind="loss",
    needs=("losses",),
    variant="the outer problem alone, in closed form; attacks are the caller's",
    compared="golden `kl_dro`; its variational form",
    example=lambda: {"losses": jnp.array([0.5, 2.0, 1.0])},
)
def kl_dro_loss(
    losses: chex.Array,
    *,
    temperature: chex.Numeric = 1.0,
    where: chex.Array | None = None,
) -> jax.Array:
    r"""The worst mean loss over reweightings that stay close to uniform.

    .. math::
      T \log \frac1n \sum_i e^{l_i / T}
      = \max_p \sum_i p_i l_i - T \sum_i p_i \log(n p_i),

    reached at :math:`p = \mathrm{softmax}(l / T)`, which is also its gradient. High
    temperatures give the mean, low ones the maximum.

    Args:
      losses: one an example, [batch]; robust losses for the paper's method.
      temperature: T > 0, the price of a reweighting. 1 is ours.
      where: which examples count, [batch]; the others are not in n either.

    Returns:
      A scalar, a statistic of the whole batch; 0 if no example counts.

    Raises:
      AssertionError: if `losses` are no vector of floats, or `where` has another shape.
      ValueError: for a temperature that is not positive and finite.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> import optax_ext as ox
      >>> losses = jnp.log(jnp.array([1.0, 1.0, 2.0]))
      >>> print(np.asarray(jax.grad(ox.losses.kl_dro_loss)(losses)).round(5))
      [0.25 0.25 0.5 ]
    """
    check_temperature("kl_dro_loss", temperature)
    (losses,) = working_floats(losses=losses)
    x, largest, t = tempered(losses, temperature, where)
    return largest + t * log_mean_exp(x, where)


@catalogued(
    **_KL_DRO,
    kind="loss",
    needs=("losses",),
    variant="the weights of one batch; `compositional_kl_dro` has the running form",
    compared="golden `kl_dro`",
    example=lambda: {"losses": jnp.array([0.5, 2.0, 1.0])},
)
def kl_dro_weights(
    losses: chex.Array,
    *,
    temperature: chex.Numeric = 1.0,
    where: chex.Array | None = None,
) -> jax.Array:
    r"""Weights of mean 1 that rise exponentially with the loss.

    .. math:: w = n\, \mathrm{softmax}(l / T)

    The mean of :math:`w_i l_i` has the gradient of `kl_dro_loss`.

    Args:
      losses: one an example, [batch]. No gradient flows into them.
      temperature: T > 0. 1 is ours.
      where: which examples count, [batch]; the others have weight 0 and are not in n.

    Returns:
      Weights [batch], without gradient.

    Raises:
      AssertionError: if `losses` are no vector of floats, or `where` has another shape.
      ValueError: for a temperature that is not positive and finite.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> losses = jnp.log(jnp.array([1.0, 1.0, 2.0]))
      >>> print(ox.losses.kl_dro_weights(losses))
      [0.75 0.75 1.5 ]
    """
    check_temperature("kl_dro_weights", temperature)
    losses = jax.lax.stop_gradient(working_floats(losses=losses)[0])
    x, _, _ = tempered(losses, temperature, where)
    return jnp.exp(x - log_mean_exp(x, where)) * mask_of(where, losses)


@catalogued(
    title="LoReUn: Data Itself Implicitly Provides Cues to Improve Machine Unlearning",
    arxiv="2507.22499",
    kind="loss",
    needs=("losses",),
    variant="more weight to smaller losses as the abstract has it; that the form is "
    "exponential, and of mean 1, is ours",
    compared="`kl_dro_weights` of the negative losses",
    example=lambda: {"losses": jnp.array([0.5, 2.0, 1.0])},
)
def loreun_weights(
    losses: chex.Array,
    *,
    temperature: chex.Numeric = 1.0,
    where: chex.Array | None = None,
) -> jax.Array:
    r"""Weights for unlearning: the better an example is known, the more it counts.

    .. math:: w = n\, \mathrm{softmax}(-l / T)

    Use them as ``mean(retain_losses) + coef * mean(w * forget_losses)``, where the
    forget loss is minus the cross-entropy (ascent), or the cross-entropy to random
    labels.

    Args:
      losses: of the examples to forget, [batch]: those of the present model (dynamic)
        or of the original one (static). No gradient flows into them.
      temperature: T > 0. 1 is ours; high temperatures weigh all alike.
      where: which examples count, [batch]; the others have weight 0 and are not in n.

    Returns:
      Weights [batch] of mean 1, without gradient.

    Raises:
      AssertionError: if `losses` are no vector of floats, or `where` has another shape.
      ValueError: for a temperature that is not positive and finite.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> losses = -jnp.log(jnp.array([0.1, 0.1, 0.2]))
      >>> print(ox.losses.loreun_weights(losses))
      [0.75 0.75 1.5 ]
    """
    check_temperature("loreun_weights", temperature)
    (losses,) = working_floats(losses=losses)
    return kl_dro_weights(-losses, temperature=temperature, where=where)


@catalogued(
    **_ROAD,
    kind="loss",
    needs=("adversary_losses", "groups"),
    example=lambda: {
        "adversary_losses": jnp.array([0.2, 0.9, 0.5, 0.7]),
        "groups": jnp.array([0, 1, 0, 1]),
        "num_groups": 2,
    },
)
def road_weights(
    adversary_losses: chex.Array,
    groups: chex.Array,
    *,
    num_groups: int,
    temperature: chex.Numeric = 1.0,
) -> jax.Array:
    r"""Weights that rise where an adversary recognises the sensitive group.

    With the adversary's losses a, and the mean over the examples j of i's own group:

    .. math:: r_i = \frac{e^{-a_i / T}}{\mathrm{mean}_j\, e^{-a_j / T}}

    Of all weights with mean 1 in every group, they minimise
    :math:`\sum r a + T \sum r \log r`.

    Args:
      adversary_losses: a, [batch]. No gradient flows into them.
      groups: index of the sensitive group, integers [batch] in 0 ... num_groups - 1.
      num_groups: how many groups there are; some may be absent from a batch.
      temperature: T > 0. High temperatures weigh all alike; the paper searches 0 to
        0.7, 1 is ours.

    Returns:
      Weights [batch], of mean 1 within each group, without gradient.

    Raises:
      AssertionError: if the arguments are not vectors of one length, or `groups` are
        not integers.
      ValueError: for a temperature that is not positive and finite, or `num_groups`
        that is no positive integer.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> import optax_ext as ox
      >>> adversary_losses = -jnp.log(jnp.array([0.6, 0.2, 0.9]))
      >>> groups = jnp.array([0, 0, 1])
      >>> weights = ox.losses.road_weights(adversary_losses, groups, num_groups=2)
      >>> print(np.asarray(weights).round(5))
      [1.5 0.5 1. ]
    """
    check_temperature("road_weights", temperature)
    check_interval("road_weights", num_groups=num_groups)
    (a,) = working_floats(adversary_losses=adversary_losses)
    groups = jnp.asarray(groups)
    chex.assert_type(groups, int, custom_message="groups must be integers")
    chex.assert_rank(a, 1, custom_message="adversary_losses must be a vector")
    chex.assert_shape(groups, a.shape, custom_message="groups must be a vector")

    a = jax.lax.stop_gradient(a)
    smallest = jax.ops.segment_min(a, groups, num_groups)
    tilted = jnp.exp((smallest[groups] - a) / jnp.asarray(temperature, a.dtype))
    total = jax.ops.segment_sum(tilted, groups, num_groups)
    size = jax.ops.segment_sum(jnp.ones_like(a), groups, num_groups)
    return tilted * size[groups] / total[groups]


@catalogued(
    **_ROAD,
    kind="loss",
    needs=("task_losses", "adversary_losses", "groups"),
    example=lambda: {
        "task_losses": jnp.array([1.0, 0.4, 0.3, 0.8]),
        "adversary_losses": jnp.array([0.2, 0.9, 0.5, 0.7]),
        "groups": jnp.array([0, 1, 0, 1]),
        "num_groups": 2,
    },
)
def road_loss(
    task_losses: chex.Array,
    adversary_losses: chex.Array,
    groups: chex.Array,
    *,
    num_groups: int,
    fairness: chex.Numeric = 1.0,
    temperature: chex.Numeric = 1.0,
) -> jax.Array:
    r"""Adversarial debiasing that pushes hardest where the group shows most.

    With task losses l, adversary losses a, and the weights r of `road_weights`:

    .. math:: l_i - \lambda\, r_i\, a_i

    The predictor minimises its mean, the adversary the plain mean of a, in turns.
    fairness = 0 is the task alone; high temperatures are ordinary adversarial
    debiasing. ROAD replaces :math:`e^{-a/T}` by the exponential of a second network's
    output, normalised in the same way, which descends mean(r a) + T mean(r log r).

    Args:
      task_losses: l, [batch].
      adversary_losses: a, [batch]; their gradient flows to the predictor through the
        adversary's input.
      groups: index of the sensitive group, integers [batch] in 0 ... num_groups - 1.
      num_groups: how many groups there are.
      fairness: lambda, 0 or more. The paper searches 0 to 5, 1 is ours.
      temperature: T > 0, as in `road_weights`.

    Returns:
      Losses [batch].

    Raises:
      AssertionError: if the arguments are not vectors of one length, or `groups` are
        not integers.
      ValueError: for hyper-parameters outside their range.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> task, adversary = jnp.ones(3), jnp.array([0.5, 0.5, 0.2])
      >>> groups = jnp.array([0, 0, 1])
      >>> print(ox.losses.road_loss(task, adversary, groups, num_groups=2))
      [0.5 0.5 0.8]
    """
    check_hyperparam("road_loss", low=0.0, fairness=fairness)
    task_losses, adversary_losses = working_floats(
        task_losses=task_losses, adversary_losses=adversary_losses
    )
    chex.assert_equal_shape(
        [task_losses, adversary_losses], custom_message="task_losses, adversary_losses"
    )
    weights = road_weights(
        adversary_losses, groups, num_groups=num_groups, temperature=temperature
    )
    fairness = jnp.asarray(fairness, task_losses.dtype)
    return task_losses - fairness * weights * adversary_losses
