"""Training on several domains: find directions that they agree on.

Steps on one domain after another follow, to second order, the sum of the gradients
plus their inner products: each step changes the gradient that the next one sees.
`fish` turns that into an optimizer without second derivatives; the loss with the inner
products written out is `optax_ext.losses.idgm_loss`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam, check_interval, check_params
from optax_ext._core.leaves import init_leaves, map_leaves, next_count
from optax_ext.wrappers.resets import reset_state_every


class FishState(NamedTuple):
    """State of `fish`; `slow` is the last meta iterate, in float32."""

    count: jax.Array
    slow: Any
    inner_state: optax.OptState


@catalogued(
    title="Gradient Matching for Domain Generalization",
    arxiv="2104.09937",
    kind="wrapper",
    needs=("params",),
    state="1 (slow parameters), and that of inner",
    variant="the code's meta step, meta_lr / num_domains; the paper writes it bare.",
    compared="goldens fish_sgd, fish_adam; optax.lookahead",
    example=lambda: {"inner": optax.sgd(0.1), "meta_lr": 1.5, "num_domains": 2},
    terminal=True,
)
def fish(
    inner: optax.GradientTransformation,
    meta_lr: float,
    num_domains: int,
    reset_inner: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Take a step on each domain in turn, then go part of the way from the start.

    With S domains, u the update of `inner`, and z the slow parameters:

    .. math::
      x_t = \begin{cases}
        x_{t-1} + u_t & t \bmod S \ne 0 \\
        z \leftarrow z + \frac{\text{meta\_lr}}{S} (x_{t-1} + u_t - z) & t \bmod S = 0
      \end{cases}

    Give it one batch of one domain a step, the domains of a round in random order. It
    is `optax.lookahead` on plain parameters; evaluate after whole rounds. Hide integer
    buffers with `optax.masked`.

    Args:
      inner: a whole optimizer; nothing after this wrapper may change the updates.
      meta_lr: part of the way, times S, in (0, S] usefully; the released configurations
        have 0.01 to 0.15 by data set. S makes it plain `inner`.
      num_domains: S, steps in a round.
      reset_inner: whether `inner` starts afresh with each round (the released code can,
        and does not by default).

    Returns:
      A link that needs params.

    Raises:
      ValueError: for a negative `meta_lr` or `num_domains` below 1; without params.

    Example:
      >>> import jax.numpy as jnp, optax, optax_ext as ox
      >>> tx = ox.fish(optax.sgd(1.0), meta_lr=1.0, num_domains=2)
      >>> x = jnp.zeros(1)
      >>> state = tx.init(x)
      >>> for grad in (1.0, 3.0):
      ...     updates, state = tx.update(jnp.full(1, grad), state, x)
      ...     x = optax.apply_updates(x, updates)
      ...     print(x)
      [-1.]
      [-2.]
    """
    check_hyperparam("fish", low=0.0, meta_lr=meta_lr)
    check_interval("fish", num_domains=num_domains)
    if reset_inner:
        inner = reset_state_every(inner, num_domains)
    inner = optax.with_extra_args_support(inner)

    def init_leaf(p):
        return (p,)

    def init(params):
        (slow,) = init_leaves(init_leaf, params, 1)
        return FishState(jnp.zeros([], jnp.int32), slow, inner.init(params))

    def update(updates, state, params=None, **extra):
        check_params("fish", params)
        out, inner_state = inner.update(updates, state.inner_state, params, **extra)
        count = next_count(state.count)
        ends_round = count % num_domains == 0

        def rule(u, slots, p):
            (slow,) = slots
            target = slow + meta_lr / num_domains * (p + u - slow)
            out = jnp.where(ends_round, target - p, u)
            return out, (jnp.where(ends_round, target, slow),)

        out, (slow,) = map_leaves(rule, out, (state.slow,), (params,))
        return out, FishState(count, slow, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
