"""Training against perturbed weights: the loss at the worst point nearby.

| function | perturbs | driven by | extra gradients |
|---|---|---|---|
| `with_weight_perturbation` | each kernel by a share of its norm | all examples | 1 |
| `awp_value_and_grad` | the same | the same | 1 |
| `rwp_value_and_grad` | all kernels by a share of their norm | low losses | 10 |

Both flatten the landscape of the loss over weights, which helps adversarial training
most: AWP generalises better, RWP means to stop robust overfitting without paying for it
in examples that are hard already. `awp_value_and_grad` is the gradient of
`with_weight_perturbation`, a loss wrapper like those in `optax_ext.losses.wrappers`.
Unlike SAM (`optax.contrib.sam`), neither sees a rescaling of layers that cancels.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam, check_interval
from optax_ext._core.geometry import length, tree_length
from optax_ext._core.leaves import init_leaves, map_leaves
from optax_ext._core.trees import treated
from optax_ext.losses._numerics import working_floats

_AWP: dict[str, Any] = {
    "title": "Adversarial Weight Perturbation Helps Robust Generalization",
    "arxiv": "2004.05884",
    "variant": "one ascent step, whose size cancels; leaves of rank 2 and more. The "
    "official loop decays weights at the perturbed point; that is the optimizer's here",
}


def _loss(params: Any, x: jax.Array) -> jax.Array:
    return jnp.sum((x @ params["w"] + params["b"]) ** 2)


def layerwise_ascent(
    params: Any, grads: Any, *, gamma: Any, mask: Any = None, eps: Any = 1e-20
) -> Any:
    """Params moved uphill, each leaf of the mask by `gamma` times its own norm.

    Args:
      params: tree of parameters.
      grads: gradients there.
      gamma: share of a leaf's norm to move it by.
      mask: which leaves move, as in `awp_value_and_grad`.
      eps: added to the norm of a gradient.
    """

    def move(p, slots, g, moves):
        if not moves:
            return p, slots
        share, floor = (jnp.asarray(x, p.dtype) for x in (gamma, eps))
        return p + share * length(p) * (g / (length(g) + floor)), slots

    moved, _ = map_leaves(move, params, (), (grads, treated(mask, params)), owner="awp")
    return moved


@catalogued(
    **_AWP,
    kind="helper",
    needs=("loss_fn",),
    compared="`awp_value_and_grad`",
    example=lambda: {"loss_fn": _loss, "gamma": 0.01},
)
def with_weight_perturbation(
    loss_fn: Callable[..., Any],
    *,
    gamma: chex.Numeric = 0.01,
    ascent_loss_fn: Callable[..., jax.Array] | None = None,
    mask: Any = None,
    eps: chex.Numeric = 1e-20,
    has_aux: bool = False,
) -> Callable[..., Any]:
    r"""The loss at weights moved against it, as a function of the weights.

    For each leaf w with gradient g of the ascent loss:

    .. math:: L(w + d), \qquad d = \gamma\, \|w\|\, \frac{g}{\|g\| + \epsilon}

    d is a constant: the gradient is that of L at w + d, which is what
    `awp_value_and_grad` returns.

    Args:
      loss_fn: ``(params, *args) -> loss``, a scalar.
      gamma: how far each leaf moves, as a share of its norm, 0 or more. 0.01 is the
        official default, 0.005 that for TRADES.
      ascent_loss_fn: ``(params, *args) -> loss``, what to climb, without aux; by
        default `loss_fn`.
      mask: which leaves move: a tree of booleans, a function of params that returns
        one, or None for those of rank 2 and more.
      eps: added to the norm of a gradient.
      has_aux: whether `loss_fn` returns ``(loss, aux)``; the result does then too.

    Returns:
      A function of the same arguments. It costs one extra gradient.

    Raises:
      TypeError: for hyper-parameters that are no numbers.
      ValueError: for negative ones.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> def loss_fn(w):
      ...     return jnp.sum(w**2)
      >>> robust = ox.losses.with_weight_perturbation(loss_fn, gamma=0.5)
      >>> print(robust(jnp.array([[2.0]])))
      9.0
    """
    check_hyperparam("with_weight_perturbation", low=0.0, gamma=gamma, eps=eps)
    ascent = jax.grad(ascent_loss_fn or loss_fn, has_aux=has_aux and not ascent_loss_fn)

    def wrapped(params: Any, *args: Any, **kwargs: Any) -> Any:
        here = jax.lax.stop_gradient(params)
        grads = ascent(here, *args, **kwargs)
        if has_aux and not ascent_loss_fn:
            grads = grads[0]
        moved = layerwise_ascent(here, grads, gamma=gamma, mask=mask, eps=eps)
        return loss_fn(_with_gradient_of(params, moved), *args, **kwargs)

    return wrapped


def _with_gradient_of(params: Any, moved: Any) -> Any:
    """The values of `moved`, as a function of `params` with slope 1."""

    def put(p, to):
        return to + (p - jax.lax.stop_gradient(p))

    return jax.tree.map(put, params, jax.lax.stop_gradient(moved))


@catalogued(
    **_AWP,
    kind="helper",
    needs=("loss_fn",),
    compared="goldens `awp` and `awp_quadratic` of the policy losses",
    example=lambda: {"loss_fn": _loss, "gamma": 0.01},
)
def awp_value_and_grad(
    loss_fn: Callable[..., jax.Array],
    *,
    gamma: chex.Numeric = 0.01,
    ascent_loss_fn: Callable[..., jax.Array] | None = None,
    mask: Any = None,
    eps: chex.Numeric = 1e-20,
) -> Callable[..., tuple[jax.Array, Any]]:
    r"""Value and gradient at weights moved against the loss, layer by layer.

    For each leaf w with gradient g of the ascent loss, both results are those at

    .. math:: w + \gamma\, \|w\|\, \frac{g}{\|g\| + \epsilon}

    and the optimizer steps from w with them. A leaf whose weights or gradient are 0
    stays where it is.

    Args:
      loss_fn: ``(params, *args) -> loss``, a scalar; adversarial examples are made by
        the caller.
      gamma: how far each leaf moves, as a share of its norm, 0 or more. 0.01 is the
        official default, 0.005 that for TRADES, which starts it after 10 epochs.
      ascent_loss_fn: ``(params, *args) -> loss``, what to climb; by default `loss_fn`.
      mask: which leaves move: a tree of booleans, a function of params that returns
        one, or None for those of rank 2 and more (kernels).
      eps: added to the norm of a gradient.

    Returns:
      A function of the same arguments that returns ``(value, grads)``, as
      `jax.value_and_grad`. It costs one extra gradient.

    Raises:
      TypeError: for hyper-parameters that are no numbers.
      ValueError: for negative ones.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> value_and_grad = ox.losses.awp_value_and_grad(lambda w: jnp.sum(w**2),
      ...     gamma=0.5)
      >>> value, grads = value_and_grad(jnp.array([[2.0]]))
      >>> print(value, grads)
      9.0 [[6.]]
    """
    check_hyperparam("awp_value_and_grad", low=0.0, gamma=gamma, eps=eps)
    return jax.value_and_grad(
        with_weight_perturbation(
            loss_fn, gamma=gamma, ascent_loss_fn=ascent_loss_fn, mask=mask, eps=eps
        )
    )


@catalogued(
    title="Robust Weight Perturbation for Adversarial Training",
    arxiv="2205.14826",
    kind="helper",
    needs=("per_example_loss_fn",),
    variant="the code: gradients add up and all kernels share one norm. The paper "
    "speaks of a step size and of a bound a layer",
    compared="golden `rwp`; `awp_value_and_grad` for one step and one leaf",
    example=lambda: {
        "per_example_loss_fn": lambda w, x: jnp.sum((x @ w) ** 2, axis=-1),
        "steps": 2,
    },
)
def rwp_value_and_grad(
    per_example_loss_fn: Callable[..., jax.Array],
    *,
    gamma: chex.Numeric = 0.01,
    loss_threshold: chex.Numeric = 1.7,
    steps: int = 10,
    mask: Any = None,
    eps: chex.Numeric = 1e-20,
) -> Callable[..., tuple[jax.Array, Any]]:
    r"""Value and gradient at weights moved against the losses that are still small.

    From a = d = 0, `steps` times, with losses l at w + d:

    .. math::
      a \leftarrow a + \nabla\, \mathrm{mean}_i\, l_i\, 1[l_i < c], \qquad
      d = \gamma\, \|w\|\, \frac{a}{\|a\| + \epsilon}

    with the norms over all leaves that move together. The result is value and gradient
    of the mean of l at w + d, over all examples. Whatever `steps`, the perturbation has
    the norm :math:`\gamma \|w\|`; it is 0 if no loss was below the threshold.

    Args:
      per_example_loss_fn: ``(params, *args) -> losses`` [batch].
      gamma: how far the weights move, as a share of their norm, 0 or more. 0.01 is the
        official default for adversarial training, 0.005 for TRADES and RST.
      loss_threshold: c. 1.7 for ten classes, 4.0 for CIFAR-100 in the official scripts:
        it should grow as the logarithm of the number of classes.
      steps: ascent steps; each costs a gradient.
      mask: which leaves move: a tree of booleans, a function of params that returns
        one, or None for those of rank 2 and more (kernels).
      eps: added to the norm of the gradients.

    Returns:
      A function of the same arguments that returns ``(value, grads)``, as
      `jax.value_and_grad`.

    Raises:
      AssertionError: at the call, if the losses are no vector.
      TypeError: for hyper-parameters that are no numbers.
      ValueError: for hyper-parameters outside their range.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> def losses(w, x):
      ...     return (x @ w)[:, 0] ** 2
      >>> value_and_grad = ox.losses.rwp_value_and_grad(losses, gamma=0.5, steps=2)
      >>> w, x = jnp.array([[2.0]]), jnp.array([[0.5], [1.0]])
      >>> value, grads = value_and_grad(w, x)  # at w = 3: only the first loss is small
      >>> print(value, grads)
      5.625 [[3.75]]
    """
    owner = "rwp_value_and_grad"
    check_hyperparam(owner, low=0.0, gamma=gamma, eps=eps)
    check_hyperparam(owner, loss_threshold=loss_threshold)
    check_interval(owner, steps=steps)

    def wrapped(params: Any, *args: Any, **kwargs: Any) -> jax.Array:
        here = jax.lax.stop_gradient(params)
        moves = treated(mask, here)

        def losses(p):
            out = per_example_loss_fn(p, *args, **kwargs)
            chex.assert_rank(
                out, 1, custom_message="per_example_loss_fn must return a vector"
            )
            return working_floats(losses=out)[0]

        def of_small_losses(p):
            out = losses(p)
            small = out < jnp.asarray(loss_threshold, out.dtype)
            return jnp.mean(jnp.where(small, out, 0))

        def zeros(p):
            return (jnp.zeros_like(p),)

        def add(g, slots, moves):
            return g, (slots[0] + g if moves else slots[0],)

        def keep(p, slots, moves):
            return p, (p if moves else slots[0],)

        (nothing,) = init_leaves(zeros, here, 1)
        _, (movable,) = map_leaves(keep, here, (nothing,), (moves,), owner=owner)
        size = tree_length(movable)

        def moved_by(climbed):
            norm = tree_length(climbed)

            def move(p, slots, a):
                share, floor = (jnp.asarray(x, p.dtype) for x in (gamma, eps))
                unit = a / (norm.astype(p.dtype) + floor)
                return p + share * size.astype(p.dtype) * unit, slots

            return map_leaves(move, here, (), (climbed,), owner=owner)[0]

        def step(_, climbed):
            grads = jax.grad(of_small_losses)(moved_by(climbed))
            return map_leaves(add, grads, (climbed,), (moves,), owner=owner)[1][0]

        climbed = jax.lax.fori_loop(0, steps, step, nothing)
        return jnp.mean(losses(_with_gradient_of(params, moved_by(climbed))))

    return jax.value_and_grad(wrapped)
