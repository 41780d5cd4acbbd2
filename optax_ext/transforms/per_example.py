"""Aggregators: from the gradients of single examples to one gradient.

They take updates with a leading example axis and emit updates without it, so they come
first in a chain, and everything behind them sees ordinary gradients:

    grads = jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))(params, batch)
    tx = optax.chain(ox.normalized_dp_aggregate(1.0, key), optax.sgd(0.1))
    updates, state = tx.update(grads, state, params)

Both are weighted means: `normalized_dp_aggregate` weighs an example by the inverse of
its gradient's length, `multiplicative_example_noise` at random around 1. Neither may be
accumulated over micro-batches by links behind it that expect sums of examples, nor be
put inside `bucketed`, which stacks leaves along the example axis.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam
from optax_ext._core.geometry import tree_length
from optax_ext._core.keys import KeyState, key_state
from optax_ext._core.trees import Bucket, computing_dtype, naming


def _key_example() -> dict[str, Any]:
    return {"key": jax.random.key(0)}


@catalogued(
    title="Train longer, generalize better: closing the generalization gap in large "
    "batch training of neural networks",
    arxiv="1705.08741",
    kind="aggregator",
    state="none (one key)",
    slots=0,
    variant="one factor an example, shared by all leaves.",
    compared="closed form: mean and covariance",
    example=lambda: {"sigma": 0.5, **_key_example()},
)
def multiplicative_example_noise(
    sigma: float, key: jax.Array | np.ndarray
) -> optax.GradientTransformationExtraArgs:
    r"""Average the examples with random weights, as noisy as a smaller batch.

    .. math:: \text{out} = \frac1B \sum_{n=1}^B z_n g_n, \qquad
      z_n \sim N(1, \sigma^2)

    Its expectation is the mean, its covariance :math:`(\sigma^2 / B^2) \sum_n g_n
    g_n^\top`. With :math:`\sigma^2 = B / B_0 - 1` that adds up to the noise of a batch
    of B_0, as long as the mean gradient is small against those of the examples.

    Args:
      sigma: standard deviation of the weights.
      key: where the draws start.

    Returns:
      A link for the first place of a chain; its updates are per-example gradients, with
      a leading axis of length B at every leaf.

    Raises:
      ValueError: for a negative `sigma`; in `update` for leaves without a common
        leading axis.

    Example:
      >>> import jax, jax.numpy as jnp, optax_ext as ox
      >>> tx = ox.multiplicative_example_noise(0.0, jax.random.key(0))
      >>> each = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> print(tx.update(each, tx.init(jnp.zeros(2)))[0])
      [2. 3.]
    """
    check_hyperparam("multiplicative_example_noise", low=0.0, sigma=sigma)
    data, impl = key_state(jnp.asarray(key))

    def update(updates, state, params=None, **extra):
        del params, extra
        examples, batch = _examples("multiplicative_example_noise", updates)
        use, keep = jax.random.split(jax.random.wrap_key_data(state.key, impl=impl))
        dtype = computing_dtype(*jax.tree.leaves(examples), jnp.zeros(0)).type
        z = 1 + sigma * jax.random.normal(use, (batch,), dtype)
        out = jax.tree.map(lambda total: total / batch, _weighted(z, examples))
        return _cast_like(out, updates), KeyState(jax.random.key_data(keep))

    return optax.GradientTransformationExtraArgs(
        lambda params: KeyState(jnp.array(data)), update
    )


@catalogued(
    title="Sharper Utility Bounds for Differentially Private Models",
    arxiv="2204.10536",
    kind="aggregator",
    state="none (one key)",
    slots=0,
    variant="lengths over the whole tree, one an example.",
    compared="golden normalized_dp_aggregate; optax's differentially_private_aggregate "
    "at norm `floor`, divided by `floor`",
    example=lambda: {"noise_multiplier": 0.5, **_key_example()},
)
def normalized_dp_aggregate(
    noise_multiplier: float, key: jax.Array | np.ndarray, floor: float = 1.0
) -> optax.GradientTransformationExtraArgs:
    r"""Average normalised gradients of examples, with noise for privacy.

    .. math:: \text{out} = \frac1B \Big( \sum_{n=1}^B \frac{g_n}{\max(|g_n|, c)} +
      \sigma \xi \Big), \qquad \xi \sim N(0, I)

    |g_n| is the length over the whole tree. No example contributes more than length 1
    to the sum, so `noise_multiplier` is what privacy accountants call by that name. It
    is `optax.contrib.differentially_private_aggregate` with ``l2_norm_clip=floor``,
    divided by `floor`; here also in float32 for bfloat16 gradients, without overflow,
    and with a key in the state that serialises.

    Args:
      noise_multiplier: sigma, standard deviation of the noise on the sum.
      key: where the draws start. There is no default: the noise protects only if
        nobody can guess it.
      floor: c, the length up to which gradients keep their proportions, positive (the
        paper's form with 1).

    Returns:
      A link for the first place of a chain; its updates are per-example gradients, with
      a leading axis of length B at every leaf.

    Raises:
      ValueError: for a negative `noise_multiplier` or a `floor` that is not positive;
        in `update` for leaves without a common leading axis.

    Example:
      >>> import jax, jax.numpy as jnp, optax_ext as ox
      >>> tx = ox.normalized_dp_aggregate(0.0, jax.random.key(0))
      >>> each = jnp.array([[3.0, 4.0], [0.2, 0.0]])
      >>> print(tx.update(each, tx.init(jnp.zeros(2)))[0])
      [0.4 0.4]
    """
    owner = "normalized_dp_aggregate"
    check_hyperparam(owner, low=0.0, noise_multiplier=noise_multiplier)
    check_hyperparam(owner, low=0.0, open_low=True, floor=floor)
    data, impl = key_state(jnp.asarray(key))

    def update(updates, state, params=None, **extra):
        del params, extra
        examples, batch = _examples(owner, updates)
        use, keep = jax.random.split(jax.random.wrap_key_data(state.key, impl=impl))
        lengths = jax.vmap(tree_length, axis_size=batch)(examples)
        total = _weighted(1 / jnp.maximum(lengths, floor), examples)
        noise = optax.tree.random_like(use, total, jax.random.normal)
        out = jax.tree.map(
            lambda x, xi: (x + noise_multiplier * xi) / batch, total, noise
        )
        return _cast_like(out, updates), KeyState(jax.random.key_data(keep))

    return optax.GradientTransformationExtraArgs(
        lambda params: KeyState(jnp.array(data)), update
    )


def _examples(owner: str, updates: Any) -> tuple[Any, int]:
    """The gradients in float32 or wider, and how many examples there are."""

    def wide(path, x):
        with naming(owner, lambda: path):
            if isinstance(x, Bucket):
                raise ValueError("aggregate examples outside bucketed, not inside")
            dtype = computing_dtype(x)
            if x.ndim == 0:
                raise ValueError(
                    "a scalar has no example axis: pass per-example gradients, as "
                    "jax.vmap(jax.grad(loss_fn), in_axes=(None, 0)) makes them"
                )
        return x.astype(dtype)

    examples = jax.tree_util.tree_map_with_path(
        wide, updates, is_leaf=lambda x: isinstance(x, Bucket)
    )
    batches = {x.shape[0] for x in jax.tree.leaves(examples)} or {1}
    if len(batches) > 1:
        raise ValueError(
            f"{owner}: leaves have {sorted(batches)} examples along their leading "
            "axis; all must have the same number"
        )
    return examples, batches.pop()


def _weighted(weights: jax.Array, examples: Any) -> Any:
    """The sum over examples, each times its weight."""
    return jax.tree.map(
        lambda g: jnp.tensordot(weights.astype(g.dtype), g, 1, precision="highest"),
        examples,
    )


def _cast_like(tree: Any, like: Any) -> Any:
    return jax.tree.map(lambda x, leaf: x.astype(leaf.dtype), tree, like)
