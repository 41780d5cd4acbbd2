r"""Classification when some labels are wrong.

| what you have | what to take | what it does |
|---|---|---|
| one network | `early_learning_regularization` | holds on to early beliefs |
| two networks | `co_teaching_loss` | each picks the other's small losses |
| features that memorise | `nested_dropout` | keeps a random number of leading ones |

Networks learn what the right labels have in common before they memorise the wrong
ones. Early-learning regularisation remembers what the network believed then, one row an
example; co-teaching leaves the examples with large losses out, more and more of them as
`forget_rate_schedule` says. Soft targets without noise are in `distillation`; labels
that are known only in bulk are in `proportions`.
"""

import chex
import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam, check_interval, check_rate
from optax_ext._core.pairs import StatefulLoss
from optax_ext.losses._numerics import masked_mean, working_floats
from optax_ext.losses._tables import table_loss

_CO_TEACHING = (
    "Co-teaching: Robust Training of Deep Neural Networks with Extremely Noisy Labels",
    "1804.06872",
)
_NESTED = ("Compressing Features for Learning with Noisy Labels", "2206.13140")


@catalogued(
    title="Early-Learning Regularization Prevents Memorization of Noisy Labels",
    arxiv="2007.00151",
    kind="loss",
    needs=("logits", "labels", "index"),
    state="none; num_examples x num_classes floats of targets",
    variant="the ELR of the paper and of its code, without the mix-up and the weight "
    "averaging of ELR+; beta and lam of its CIFAR-10 configuration",
    compared="golden `early_learning_regularization`; closed form of the gradient",
    example=lambda: {"num_examples": 4, "num_classes": 3},
)
def early_learning_regularization(
    num_examples: int,
    num_classes: int,
    *,
    beta: chex.Numeric = 0.7,
    lam: chex.Numeric = 3.0,
) -> StatefulLoss:
    r"""Keep a network on the labels it believed before it memorised wrong ones.

    Each example i has a target t_i, a moving average of what the model said of it. With
    p the probabilities softmax(z), clipped to [1e-4, 1 - 1e-4],

    .. math::
      t_i &\leftarrow \beta t_i + (1 - \beta) \frac{p_i}{\sum_k p_{ik}} \\
      l_i &= \mathrm{CE}(z_i, y_i) + \lambda \log(1 - \langle t_i, p_i \rangle)

    in this order. Targets carry no gradient. The second term grows the probability of
    the class that the target holds likely, and cancels the gradient of a label that
    contradicts it.

    ``apply(state, logits, labels, index) -> (losses, state)`` takes logits z
    [..., classes], labels y and ``index``, which example each row is, integers [...].
    The state is the table of targets [num_examples, num_classes]; shard it over
    examples. Of duplicate indices in a batch each has its own loss from the old row,
    and one of them, it is not defined which, stays in the table. Rows of padding may
    have the index `num_examples`: they are not stored.

    Args:
      num_examples: rows of the table: training examples, numbered from 0.
      num_classes: columns of the table.
      beta: decay rate of the targets in [0, 1) (CIFAR-10: 0.7; CIFAR-100 and
        asymmetric noise: 0.9). There is no bias correction.
      lam: strength of the regulariser, 0 or more (CIFAR-10: 3; asymmetric noise: 1;
        CIFAR-100: 7).

    Returns:
      A ``StatefulLoss``; one loss a row.

    Raises:
      ValueError: for hyper-parameters out of range.
      AssertionError: in ``apply``, for shapes that do not fit, logits that are not
        floats, or labels or an index that are not integers.

    Example:
      >>> import jax, jax.numpy as jnp, optax_ext as ox
      >>> elr = ox.losses.early_learning_regularization(5, 2, beta=0.5, lam=1.0)
      >>> def loss_fn(z, state):
      ...     losses, state = elr.apply(state, z, jnp.array([0]), jnp.array([3]))
      ...     return losses.mean(), state
      >>> grad, state = jax.grad(loss_fn, has_aux=True)(jnp.zeros((1, 2)), elr.init())
      >>> print(state[3], grad)
      [0.25 0.25] [[-0.5  0.5]]
    """
    owner = "early_learning_regularization"
    check_rate(owner, beta=beta)
    check_hyperparam(owner, low=0.0, lam=lam)

    def rule(targets, logits, labels):
        decay, strength = (jnp.asarray(x, logits.dtype) for x in (beta, lam))
        p = jnp.clip(jax.nn.softmax(logits), 1e-4, 1 - 1e-4)
        beliefs = jax.lax.stop_gradient(p / jnp.sum(p, -1, keepdims=True))
        targets = decay * targets + (1 - decay) * beliefs
        agreement = jnp.sum(targets * p, -1)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses + strength * jnp.log1p(-agreement), targets

    return table_loss(owner, num_examples, num_classes, rule)


@catalogued(
    title=_CO_TEACHING[0],
    arxiv=_CO_TEACHING[1],
    kind="helper",
    needs=("losses",),
    variant="as in Nested-Co-teaching (2206.13140), but the count is repaired where "
    "1 - 0.9 rounds below 0.1",
    compared="golden `co_teaching`; counts in exact arithmetic",
    example=lambda: {"losses": jnp.array([0.1, 3.0, 0.2]), "forget_rate": 0.4},
)
def co_teaching_weights(losses: chex.Array, forget_rate: chex.Numeric) -> jax.Array:
    r"""Keep the examples with the smallest losses.

    .. math::
      w_i = [\mathrm{rank}(l_i) < \lfloor (1 - r)\, n \rfloor]

    Args:
      losses: l, one loss an example, [n]. Detached. Equal ones rank by position.
      forget_rate: r in [0, 1], the share to leave out; may be traced.

    Returns:
      Weights 0 and 1, [n].

    Raises:
      AssertionError: if `losses` are no vector of floats.
      ValueError: if `forget_rate` is out of range.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> losses = jnp.array([0.3, 2.0, 0.1, 0.2])
      >>> print(ox.losses.co_teaching_weights(losses, 0.5))
      [0. 0. 1. 1.]
    """
    check_hyperparam("co_teaching_weights", low=0, high=1, forget_rate=forget_rate)
    (losses,) = working_floats(losses=losses)
    chex.assert_rank(losses, 1, custom_message="losses must be a vector")

    # Rates such as 0.9 are rounded: (1 - 0.9) 10 must keep one example, not none.
    share = 1 - jnp.asarray(forget_rate, losses.dtype)
    slack = 1e-6 + losses.size * float(jnp.finfo(losses.dtype).eps)
    keep = jnp.floor(share * losses.size + slack)
    ranks = jnp.argsort(jnp.argsort(jax.lax.stop_gradient(losses)))
    return (ranks.astype(keep.dtype) < keep).astype(losses.dtype)


@catalogued(
    title=_CO_TEACHING[0],
    arxiv=_CO_TEACHING[1],
    kind="loss",
    needs=("losses_a", "losses_b"),
    variant="one batch for both networks; the code of Nested-Co-teaching (2206.13140) "
    "gives each half of it and selects in evaluation mode: pass such losses to "
    "`co_teaching_weights`",
    compared="golden `co_teaching`",
    example=lambda: {
        "losses_a": jnp.array([0.1, 3.0, 0.2]),
        "losses_b": jnp.array([2.0, 0.3, 0.1]),
        "forget_rate": 0.3,
    },
)
def co_teaching_loss(
    losses_a: chex.Array, losses_b: chex.Array, forget_rate: chex.Numeric
) -> tuple[jax.Array, jax.Array]:
    r"""Two networks train on the examples that the other finds easy.

    .. math::
      L_a = \frac{\sum_i w_i(l^b)\, l^a_i}{\sum_i w_i(l^b)}, \qquad
      L_b = \frac{\sum_i w_i(l^a)\, l^b_i}{\sum_i w_i(l^a)}

    with w from `co_teaching_weights`.

    Args:
      losses_a: losses of network a, one an example, [n].
      losses_b: losses of network b on the same examples, [n].
      forget_rate: the share of examples to leave out, in [0, 1]; may be traced. See
        `forget_rate_schedule`.

    Returns:
      Two scalars, L_a and L_b. Add them to train both networks at once: neither has a
      gradient in the other. With nothing kept they are 0.

    Raises:
      AssertionError: for losses that are no vectors of one length, or no floats.
      ValueError: if `forget_rate` is out of range.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> a, b = jnp.array([1.0, 2.0, 9.0]), jnp.array([1.0, 5.0, 2.0])
      >>> print(*ox.losses.co_teaching_loss(a, b, 0.3))  # b picks 0, 2; a picks 0, 1
      5.0 3.0
    """
    losses_a, losses_b = working_floats(losses_a=losses_a, losses_b=losses_b)
    chex.assert_rank(losses_a, 1, custom_message="losses_a must be a vector")
    message = "losses_a, losses_b must be of the same examples"
    chex.assert_equal_shape([losses_a, losses_b], custom_message=message)
    return (
        masked_mean(losses_a, co_teaching_weights(losses_b, forget_rate)),
        masked_mean(losses_b, co_teaching_weights(losses_a, forget_rate)),
    )


@catalogued(
    title=_CO_TEACHING[0],
    arxiv=_CO_TEACHING[1],
    kind="schedule",
    variant="linear over epochs 0 to ramp_epochs - 1, as in Nested-Co-teaching",
    compared="values by hand",
    example=lambda: {"rate": 0.2, "ramp_epochs": 5},
)
def forget_rate_schedule(rate: chex.Numeric, ramp_epochs: int) -> optax.Schedule:
    r"""Leave out more and more examples as a network begins to memorise.

    .. math:: r(e) = \text{rate} \cdot \min(e / (\text{ramp\_epochs} - 1), 1)

    Args:
      rate: share of examples to leave out in the end, in [0, 1]: about the share of
        wrong labels (official code: 0.2).
      ramp_epochs: epochs until then (official code: 5); at most 1 is at once.

    Returns:
      A schedule of the epoch e, counted from 0, for `co_teaching_loss`.

    Raises:
      ValueError: if `rate` is out of range.

    Example:
      >>> import optax_ext as ox
      >>> rate = ox.losses.forget_rate_schedule(0.2, 5)
      >>> print(rate(0), rate(1), rate(4), rate(9))
      0.0 0.05 0.2 0.2
    """
    check_hyperparam("forget_rate_schedule", low=0, high=1, rate=rate)

    def schedule(count):
        final = jnp.asarray(rate, float)
        if ramp_epochs <= 1:
            return final
        return final * jnp.minimum(jnp.asarray(count, float) / (ramp_epochs - 1), 1)

    return schedule


@catalogued(
    title=_NESTED[0],
    arxiv=_NESTED[1],
    kind="helper",
    needs=("features", "k"),
    variant="no rescaling of what is kept",
    compared="golden `nested_dropout`",
    example=lambda: {"features": jnp.ones((3, 4)), "k": 2},
)
def nested_dropout(features: chex.Array, k: chex.Numeric) -> jax.Array:
    r"""Keep the first k features and set the others to 0.

    .. math:: \tilde h_d = h_d\, [d < k]

    With k drawn anew for every batch (see `nested_dropout_probs`), features order
    themselves by how much they matter. At test time, take the k that is best on
    validation data, for predictions and for the selection of co-teaching.

    Args:
      features: h, [..., features].
      k: how many to keep, 1 to all of them; one number for the batch, may be traced.

    Returns:
      Features of the same shape and dtype.

    Raises:
      AssertionError: if `features` are no floats or have no axis.
      ValueError: if `k` is out of range.

    Example:
      >>> import jax, jax.numpy as jnp, optax_ext as ox
      >>> print(ox.losses.nested_dropout(jnp.array([[1.0, 2.0, 3.0]]), 2))
      [[1. 2. 0.]]
      >>> probs = ox.losses.nested_dropout_probs(512, std=50.0)
      >>> k = 1 + jax.random.choice(jax.random.key(0), 512, p=probs)
    """
    features = jnp.asarray(features)
    message = "features must be floating point"
    chex.assert_type(features, float, custom_message=message)
    message = "features need an axis of features"
    chex.assert_rank(features, set(range(1, 33)), custom_message=message)
    check_hyperparam("nested_dropout", low=1, high=features.shape[-1], k=k)
    kept = jnp.arange(features.shape[-1]) < jnp.asarray(k, int)
    return jnp.where(jnp.broadcast_to(kept, features.shape), features, 0)


@catalogued(
    title=_NESTED[0],
    arxiv=_NESTED[1],
    kind="helper",
    variant="without the factor 1/2 of a normal density, as in the official code",
    compared="golden `nested_dropout`",
    example=lambda: {"num_features": 8, "std": 3.0},
)
def nested_dropout_probs(
    num_features: int, *, std: chex.Numeric, mean: chex.Numeric = 0.0
) -> jax.Array:
    r"""Probabilities of how many features `nested_dropout` keeps.

    .. math:: P(k) \propto \exp(-((k - \text{mean}) / \text{std})^2), \quad k = 1..D

    Args:
      num_features: D.
      std: width of the distribution in features, above 0 (official code: 10 to 100 of
        512; no default).
      mean: its centre in features (official code: 0, so that k = 1 is likeliest).

    Returns:
      Probabilities [D]; entry d is that of k = d + 1.

    Raises:
      ValueError: if `std` is not positive or `num_features` below 1.

    Example:
      >>> import optax_ext as ox
      >>> print(ox.losses.nested_dropout_probs(3, std=1.0).round(3))
      [0.952 0.047 0.   ]
    """
    owner = "nested_dropout_probs"
    check_interval(owner, num_features=num_features)
    check_hyperparam(owner, low=0.0, open_low=True, std=std)
    check_hyperparam(owner, mean=mean)
    k = jnp.arange(1, num_features + 1, dtype=float)
    mean, std = (jnp.asarray(x, k.dtype) for x in (mean, std))
    return jax.nn.softmax(-(((k - mean) / std) ** 2))
