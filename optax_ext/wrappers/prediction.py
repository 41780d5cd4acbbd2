"""Weight prediction: gradients at the weights that the optimizer will reach.

A momentum knows where the next step goes, nearly. `xgrad` remembers the last update of
the optimizer that it wraps; `xgrad_predict` moves the parameters once more by it, and
there the caller takes the next gradient. Around SGD with momentum m, and m times the
update, this is Nesterov's method; around Adam it is the same idea for Adam.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam
from optax_ext._core.leaves import init_leaves, map_leaves
from optax_ext._core.states import fill, find_state


class XGradState(NamedTuple):
    """State of `xgrad`; `shift` is float32, the update times `steps`."""

    shift: optax.Updates
    inner_state: optax.OptState


@catalogued(
    title="XGrad: Boosting Gradient-Based Optimizers With Weight Prediction",
    arxiv="2305.18240",
    kind="wrapper",
    state="1 (last update), and that of inner",
    variant="the official code: Adam's prediction has the bias correction of the step "
    "just made, and no weight decay.",
    compared="goldens xgrad_sgdm, xgrad_adamw; optax.sgd(nesterov=True)",
    example=lambda: {"inner": optax.trace(0.9)},
)
def xgrad(
    inner: optax.GradientTransformation, steps: float = 1.0
) -> optax.GradientTransformationExtraArgs:
    r"""Remember the update, so that `xgrad_predict` can repeat it.

    .. math:: \Delta_t = k\, u_t, \qquad \text{out} = u_t

    The updates are those of `inner`. What changes is where you take gradients: at
    ``xgrad_predict(state, params)``; ``update`` still gets the real parameters. Before
    the first step the prediction is the parameters themselves.

    Around a whole optimizer (learning rate inside) predict with the default scale of 1.
    Around a direction, as in ``chain(xgrad(scale_by_adam()), add_decayed_weights(wd),
    scale_by_learning_rate(lr))``, predict with a scale of minus the coming learning
    rate; that is the paper's AdamW.

    Args:
      inner: an optimizer, or a link that emits a direction.
      steps: k, how many updates to look ahead, a fraction if you like. 1 is the method
        without tuning; the paper tries a few small numbers, its code leaves it open.

    Returns:
      A link with one tree of state beside that of `inner`. Inside `bucketed` the
      prediction cannot be read: put `bucketed` inside `xgrad`.

    Raises:
      TypeError: for `steps` that are no number.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_ext as ox
      >>> f = lambda x: jnp.sum(x**2)
      >>> tx = ox.xgrad(optax.sgd(0.25, momentum=0.5), steps=0.5)
      >>> x = jnp.array([1.0, -2.0])
      >>> state = tx.init(x)
      >>> for _ in range(2):
      ...     grads = jax.grad(f)(ox.xgrad_predict(state, x))
      ...     updates, state = tx.update(grads, state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> print(x)
      [ 0.125 -0.25 ]
    """
    check_hyperparam("xgrad", steps=steps)
    inner = optax.with_extra_args_support(inner)

    def init_leaf(p):
        return (jnp.zeros_like(p),)

    def init(params):
        (shift,) = init_leaves(init_leaf, params, 1)
        return XGradState(shift, inner.init(params))

    def rule(u, slots):
        del slots
        return u, (steps * u,)

    def update(updates, state, params=None, **extra):
        out, inner_state = inner.update(updates, state.inner_state, params, **extra)
        _, (shift,) = map_leaves(rule, out, (state.shift,))
        return out, XGradState(shift, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def xgrad_predict(state: optax.OptState, params: Any, scale: Any = 1.0) -> Any:
    r"""The point at which to take the next gradient: params + scale * shift.

    Args:
      state: any optimizer state that holds one `XGradState`.
      params: the present parameters.
      scale: 1 where `xgrad` wraps a whole optimizer; minus the learning rate of the
        coming step where it wraps a direction.

    Returns:
      A tree like params. Leaves that a mask hides from `xgrad` stay as they are.

    Raises:
      ValueError: if there is no `XGradState`, or more than one.

    Example:
      >>> import jax.numpy as jnp, optax, optax_ext as ox
      >>> tx = optax.chain(ox.xgrad(optax.identity()), optax.scale(-0.5))
      >>> x = jnp.ones(2)
      >>> _, state = tx.update(jnp.array([1.0, 2.0]), tx.init(x))
      >>> print(ox.xgrad_predict(state, x, scale=-0.5))
      [0.5 0. ]
    """
    shift = find_state("xgrad_predict", state, XGradState).shift

    def rule(shift, slots, p):
        return p + jnp.asarray(scale, shift.real.dtype) * shift, slots

    predicted, _ = map_leaves(rule, shift, (), (params,))
    return fill(predicted, params, owner="xgrad_predict")
