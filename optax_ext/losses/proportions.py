r"""Learning from bags of examples of which only the share of positives is known.

`easy_llp_labels` turns the share of a bag into one soft label for all of its examples,
and `easy_llp_loss` mixes their losses with it. In expectation over the bags that is the
loss of single labels; the price is variance, which grows with the size of the bags.
"""

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_interval
from optax_ext.losses._numerics import working_floats

_LLP = ("Easy Learning from Label Proportions", "2302.03115")


@catalogued(
    title=_LLP[0],
    arxiv=_LLP[1],
    kind="helper",
    needs=("proportions", "prior"),
    variant="the unbiased estimate of the paper",
    compared="golden `easy_llp`; enumeration of all labels of a bag",
    example=lambda: {
        "proportions": jnp.array([0.2, 0.6, 0.4]),
        "bag_size": 5,
        "prior": 0.4,
    },
)
def easy_llp_labels(
    proportions: chex.Array, *, bag_size: int, prior: chex.Numeric
) -> jax.Array:
    r"""Soft labels for the examples of a bag.

    .. math:: \tilde y = k\, (\alpha - p) + p

    Given an example, the mean over the other k - 1 of its bag is P(y = 1 | x). The
    bags must be independent draws from the data.

    Args:
      proportions: alpha, the share of positives of each bag, [...]; with more than two
        classes the shares of each, [..., classes].
      bag_size: k, examples a bag, 1 or more.
      prior: p = P(y = 1), a scalar, or [classes]. The mean of the proportions is an
        estimate of it.

    Returns:
      Soft labels of the shape of `proportions`, for every example of the bag. They may
      leave [0, 1]; their variance for a pure guess is k p (1 - p).

    Raises:
      AssertionError: for a `prior` that does not broadcast to the proportions, or
        arguments that are not floats.
      ValueError: if `bag_size` is no integer of 1 or more.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> alpha = jnp.array([0.0, 0.5, 1.0])
      >>> print(ox.losses.easy_llp_labels(alpha, bag_size=2, prior=0.5))
      [-0.5  0.5  1.5]
    """
    check_interval("easy_llp_labels", bag_size=bag_size)
    proportions, prior = working_floats(proportions=proportions, prior=prior)
    message = "prior must broadcast to proportions"
    chex.assert_is_broadcastable(prior.shape, proportions.shape, custom_message=message)
    prior = jnp.broadcast_to(prior, proportions.shape)
    return bag_size * (proportions - prior) + prior


@catalogued(
    title=_LLP[0],
    arxiv=_LLP[1],
    kind="loss",
    needs=("losses_positive", "losses_negative", "soft_labels"),
    variant="of any instance loss; for more than two classes it is a sum, see below",
    compared="golden `easy_llp`; enumeration of all labels of a bag",
    example=lambda: {
        "losses_positive": jnp.array([0.2, 1.0, 0.5]),
        "losses_negative": jnp.array([1.5, 0.4, 0.9]),
        "soft_labels": jnp.array([1.2, -0.3, 0.4]),
    },
)
def easy_llp_loss(
    losses_positive: chex.Array, losses_negative: chex.Array, soft_labels: chex.Array
) -> jax.Array:
    r"""Unbiased losses of single examples from the shares of their bags.

    .. math:: l = \tilde y\, l(f, 1) + (1 - \tilde y)\, l(f, 0)

    With more than two classes, it is ``jnp.sum(soft_labels * losses, -1)`` over the
    losses l(f, c) that each class would have as a label.

    Args:
      losses_positive: l(f, 1), what each example would lose were it positive; [...].
      losses_negative: l(f, 0), the same were it negative; [...].
      soft_labels: y~ from `easy_llp_labels`, broadcastable to the losses: for losses
        [bags, bag_size] pass ``labels[:, None]``.

    Returns:
      One loss an example, [...]. Single ones may be negative, and so may their mean.

    Raises:
      AssertionError: for shapes that do not fit, or arguments that are not floats.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> positive, negative = jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 0.0]])
      >>> print(ox.losses.easy_llp_loss(positive, negative, jnp.array([[1.5]])))
      [[0. 3.]]
    """
    losses_positive, losses_negative, soft_labels = working_floats(
        losses_positive=losses_positive,
        losses_negative=losses_negative,
        soft_labels=soft_labels,
    )
    message = "losses_positive, losses_negative must be of the same examples"
    chex.assert_equal_shape([losses_positive, losses_negative], custom_message=message)
    message = "soft_labels must broadcast to the losses"
    shape = losses_positive.shape
    chex.assert_is_broadcastable(soft_labels.shape, shape, custom_message=message)
    soft_labels = jnp.broadcast_to(soft_labels, shape)
    return soft_labels * losses_positive + (1 - soft_labels) * losses_negative
