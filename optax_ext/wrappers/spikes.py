"""Steps left out because their gradient is an outlier.

One bad batch can undo a thousand good steps: its gradient enters moments that remember
it for long. `optax.apply_if_finite` leaves out what is not a number; here a step is
left out that is a number but an unlikely one, judged by what was usual so far.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.checks import (
    check_choice,
    check_hyperparam,
    check_interval,
    check_rate,
)
from optax_ext._core.extra_args import require
from optax_ext._core.geometry import tree_length
from optax_ext._core.leaves import next_count


class SkipSpikesState(NamedTuple):
    """State of `skip_spikes`; all but the last are scalars.

    Attributes:
      count: steps that entered the statistics.
      mean: running mean of the log-norm (or the loss).
      variance: its running variance.
      last_skipped: whether the last step was skipped.
      consecutive_skips: spikes skipped since the last step that was taken.
      total_skipped: steps skipped so far, non-finite ones included.
      total_notfinite: steps skipped because they were not finite.
      inner_state: state of the inner link.
    """

    count: jax.Array
    mean: jax.Array
    variance: jax.Array
    last_skipped: jax.Array
    consecutive_skips: jax.Array
    total_skipped: jax.Array
    total_notfinite: jax.Array
    inner_state: optax.OptState


def skip_spikes(
    inner: optax.GradientTransformation,
    threshold: float = 5.0,
    decay: float = 0.99,
    *,
    warmup_steps: int = 100,
    max_consecutive_skips: int = 5,
    min_std: float = 0.1,
    measure: str = "grad_norm",
) -> optax.GradientTransformationExtraArgs:
    r"""Leave out steps whose gradient norm is an outlier, and keep counting.

    With y the logarithm of the global gradient norm, m and s its running mean and
    standard deviation before this step:

    .. math:: \text{skip if} \quad
      z = \frac{y - m}{\max(s, \text{min\_std})} > \text{threshold}

    A skipped step emits zeros and leaves the state of `inner` as it was, so moments,
    counts and schedules inside stand still. Only what is too large is skipped.

    The statistics are kept at every finite step, skipped or not, from y clipped to
    m +- threshold * max(s, min_std). A spike so moves them by little, and by something:
    where all gradients have grown, s grows by the step until they pass. (Left out, s
    could only shrink; taken as it is, one spike would hide the next.) After
    `max_consecutive_skips` skips in a row the next step is taken, spike or not, and m
    is set to its y: the level has shifted. The average weighs the first steps equally
    (1/t until that is less than 1 - decay), so it has no bias to correct. Zero
    gradients pass and do not enter.

    Steps that are not finite are always skipped; they never enter the statistics and
    do not count as consecutive.

    Args:
      inner: link or optimizer to guard, normally the whole chain.
      threshold: standard deviations beyond which a step is a spike. 5 of a normal
        log-norm come by chance once in 3.5 million steps.
      decay: of the running mean and variance, in [0, 1); 0.99 is a memory of about
        100 steps.
      warmup_steps: steps that must have entered before one can be a spike.
      max_consecutive_skips: longest run of skipped spikes.
      min_std: least standard deviation to judge by: 0.1 means that no norm below
        exp(0.1 * threshold) times the usual one is a spike, however smooth the run.
        In units of the loss with ``measure="value"``.
      measure: "grad_norm", or "value": y is the loss itself, from the extra argument
        ``value``.

    Returns:
      A link with a `SkipSpikesState`; read it with `spike_statistics`. `inner` is
      computed at every step, and not taken at skipped ones.

    Raises:
      ValueError: for arguments out of range; at trace time without ``value`` where it
        is measured.

    Example:
      >>> import jax.numpy as jnp, optax, optax_ext as ox
      >>> tx = ox.skip_spikes(optax.sgd(1.0), warmup_steps=3)
      >>> state = tx.init(jnp.zeros(2))
      >>> for size in (1.0, 1.1, 0.9, 50.0, 1.0):
      ...     updates, state = tx.update(jnp.array([size, 0.0]), state)
      ...     print(updates, int(state.total_skipped))
      [-1. -0.] 0
      [-1.1 -0. ] 0
      [-0.9 -0. ] 0
      [0. 0.] 1
      [-1. -0.] 1
    """
    check_hyperparam("skip_spikes", low=0.0, open_low=True, threshold=threshold)
    check_hyperparam("skip_spikes", low=0.0, min_std=min_std)
    check_rate("skip_spikes", decay=decay)
    check_interval(
        "skip_spikes",
        warmup_steps=warmup_steps,
        max_consecutive_skips=max_consecutive_skips,
    )
    check_choice("skip_spikes", "measure", measure, ("grad_norm", "value"))
    inner = optax.with_extra_args_support(inner)

    def init(params):
        def zero(dtype):
            return jnp.zeros([], dtype)

        return SkipSpikesState(
            count=zero(jnp.int32),
            mean=zero(jnp.float32),
            variance=zero(jnp.float32),
            last_skipped=zero(bool),
            consecutive_skips=zero(jnp.int32),
            total_skipped=zero(jnp.int32),
            total_notfinite=zero(jnp.int32),
            inner_state=inner.init(params),
        )

    def observe(updates, extra):
        """What is measured, whether it is finite, whether it enters."""
        norm = tree_length(updates)
        if measure == "grad_norm":
            y, finite, enters = jnp.log(norm), jnp.isfinite(norm), norm > 0
        else:
            y = jnp.asarray(require("skip_spikes", extra, "value"))
            finite = jnp.isfinite(norm) & jnp.isfinite(y)
            enters = finite
        y = jnp.where(finite & enters, y, jnp.zeros_like(y)).astype(jnp.float32)
        return y, finite, finite & enters

    def update(updates, state, params=None, **extra):
        y, finite, enters = observe(updates, extra)
        warm = state.count >= warmup_steps
        bound = threshold * jnp.maximum(jnp.sqrt(state.variance), min_std)
        spike = enters & warm & (y - state.mean > bound)
        shifted = spike & (state.consecutive_skips >= max_consecutive_skips)
        skip = ~finite | (spike & ~shifted)

        count = jnp.where(enters, next_count(state.count), state.count)
        weight = jnp.maximum(1 - decay, 1 / jnp.maximum(count, 1).astype(jnp.float32))
        delta = y - state.mean
        delta = jnp.where(warm, jnp.clip(delta, -bound, bound), delta)
        mean = jnp.where(shifted, y, state.mean + weight * delta)
        variance = (1 - weight) * (state.variance + weight * delta**2)

        out, new = inner.update(updates, state.inner_state, params, **extra)
        out = jax.tree.map(lambda u: jnp.where(skip, jnp.zeros_like(u), u), out)
        kept = jax.tree.map(lambda a, b: jnp.where(skip, a, b), state.inner_state, new)
        run = jnp.where(spike & skip, next_count(state.consecutive_skips), 0)
        return out, SkipSpikesState(
            count=count,
            mean=jnp.where(enters, mean, state.mean),
            variance=jnp.where(enters, variance, state.variance),
            last_skipped=skip,
            consecutive_skips=jnp.where(finite, run, state.consecutive_skips),
            total_skipped=_add(state.total_skipped, skip),
            total_notfinite=_add(state.total_notfinite, ~finite),
            inner_state=kept,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _add(count: jax.Array, happened: jax.Array) -> jax.Array:
    return jnp.where(happened, next_count(count), count)


def spike_statistics(state: Any) -> dict[str, jax.Array]:
    """What `skip_spikes` has seen and skipped, for logging.

    Args:
      state: any optimizer state with one `SkipSpikesState` in it.

    Returns:
      Scalars by name: ``mean`` and ``std`` of the log-norm (or the loss),
      ``last_skipped``, ``consecutive_skips``, ``total_skipped``, ``total_notfinite``.

    Raises:
      ValueError: if there is none, or more than one.

    Example:
      >>> import jax.numpy as jnp, optax, optax_ext as ox
      >>> tx = ox.skip_spikes(optax.sgd(1.0))
      >>> _, state = tx.update(jnp.array([jnp.nan]), tx.init(jnp.zeros(1)))
      >>> int(ox.spike_statistics(state)["total_notfinite"])
      1
    """

    def is_ours(node):
        return isinstance(node, SkipSpikesState)

    found = [s for s in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(s)]
    if len(found) != 1:
        raise ValueError(
            f"spike_statistics: the state has {len(found)} SkipSpikesStates, not one; "
            "pass the part of it that you mean"
        )
    (ours,) = found
    return {
        "mean": ours.mean,
        "std": jnp.sqrt(ours.variance),
        "last_skipped": ours.last_skipped,
        "consecutive_skips": ours.consecutive_skips,
        "total_skipped": ours.total_skipped,
        "total_notfinite": ours.total_notfinite,
    }
