"""Loss wrappers: they take ``loss_fn(params, *args)`` and return such a function.

| wrapper | changes the loss to | extra gradients |
|---|---|---|
| `flooding` | abs(L - b) + b: no training below the level b | 0 |
| `with_regularizer` | L + weight * penalty(params) | 0 |
| `with_z_loss` | L + coef * mean of (log Z)^2 of its logits | 0 |
| `with_gradient_penalty` | L + weight * norm of its gradient | 1, and through it |
| `with_weight_perturbation` | L at weights moved against it | 1 |

They nest in any order, work with `optax_ext.make_train_step`, and what they wrap may
return ``(loss, aux)``: say so with ``has_aux=True`` at each. Order has a meaning:
``flooding(with_regularizer(f, ...))`` floods the sum, ``with_regularizer(flooding(f),
...)`` regularises at full strength also below the level. The last of them stands in
`optax_ext.losses.perturbation`.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam
from optax_ext._core.trees import computing_dtype
from optax_ext.losses._numerics import masked_mean, norm_of, working_floats
from optax_ext.losses.calibration import magnitude
from optax_ext.losses.stability import z_loss

LossFn = Callable[..., Any]
"""``(params, *args) -> loss``, or ``(loss, aux)``."""


def _square(w: jax.Array) -> jax.Array:
    return jnp.sum(w**2)


def _changed(
    loss_fn: LossFn,
    has_aux: bool,
    change: Callable[[jax.Array, Any, Any], jax.Array],
) -> LossFn:
    """`loss_fn` with ``change(loss, aux, params)`` in place of the loss."""

    def wrapped(params: Any, *args: Any, **kwargs: Any) -> Any:
        out = loss_fn(params, *args, **kwargs)
        loss, aux = out if has_aux else (out, None)
        loss = change(_scalar("loss_fn", loss), aux, params)
        return (loss, aux) if has_aux else loss

    return wrapped


def _scalar(name: str, value: Any) -> jax.Array:
    """The value of a function in float32 or wider."""
    (value,) = working_floats(**{f"the value of {name}": value})
    chex.assert_rank(value, 0, custom_message=f"{name} must return a scalar")
    return value


def _plus(loss: jax.Array, weight: chex.Numeric, penalty: jax.Array) -> jax.Array:
    loss, penalty = working_floats(loss=loss, penalty=penalty)
    return loss + jnp.asarray(weight, loss.dtype) * penalty


@catalogued(
    title="Do We Need Zero Training Loss After Achieving Zero Training Error?",
    arxiv="2002.08709",
    kind="helper",
    needs=("loss_fn",),
    variant="of the loss of the batch, as in the paper",
    compared="closed form",
    example=lambda: {"loss_fn": _square, "flood_level": 0.1},
)
def flooding(
    loss_fn: LossFn, *, flood_level: chex.Numeric, has_aux: bool = False
) -> LossFn:
    r"""Keep the training loss from falling below a level.

    .. math:: |L - b| + b

    Above b nothing changes; below it the gradient turns round, and training drifts
    about the level, to flatter places.

    Args:
      loss_fn: ``(params, *args) -> loss``, a scalar: the mean over the batch.
      flood_level: b, 0 or more. The paper searches 0 to 0.2 for the cross-entropy.
      has_aux: whether `loss_fn` returns ``(loss, aux)``; the result does then too.

    Returns:
      A function of the same arguments, whose loss is at least `flood_level`.

    Raises:
      AssertionError: at the call, if the loss is no scalar.
      ValueError: for a negative level.

    Example:
      >>> import jax, jax.numpy as jnp, optax_ext as ox
      >>> flooded = ox.losses.flooding(jnp.sum, flood_level=1.0)
      >>> print(flooded(jnp.array([0.25, 0.5])))
      1.25
      >>> print(jax.grad(flooded)(jnp.array([0.25, 0.5])))
      [-1. -1.]
    """
    check_hyperparam("flooding", low=0.0, flood_level=flood_level)

    def change(loss, aux, params):
        level = jnp.asarray(flood_level, loss.dtype)
        return magnitude(loss - level) + level

    return _changed(loss_fn, has_aux, change)


@catalogued(
    title="A Simple Weight Decay Can Improve Generalization",
    kind="helper",
    needs=("loss_fn", "penalty_fn"),
    variant="any penalty on the parameters, of which the paper has the squared norm",
    compared="closed form",
    example=lambda: {"loss_fn": _square, "penalty_fn": _square, "weight": 0.1},
)
def with_regularizer(
    loss_fn: LossFn,
    penalty_fn: Callable[[Any], jax.Array],
    *,
    weight: chex.Numeric,
    has_aux: bool = False,
) -> LossFn:
    r"""Add a penalty on the parameters to a loss.

    .. math:: L + \lambda\, R(\text{params})

    For plain L2, decoupled weight decay (`optax.adamw`) is the better choice.

    Args:
      loss_fn: ``(params, *args) -> loss``, a scalar.
      penalty_fn: R, ``params -> penalty``, a scalar.
      weight: lambda, a number.
      has_aux: whether `loss_fn` returns ``(loss, aux)``; the result does then too.

    Returns:
      A function of the same arguments.

    Raises:
      AssertionError: at the call, if loss or penalty is no scalar.
      TypeError: for a weight that is no number.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> def l1(params):
      ...     return jnp.sum(jnp.abs(params))
      >>> loss_fn = ox.losses.with_regularizer(jnp.max, l1, weight=0.5)
      >>> print(loss_fn(jnp.array([-1.0, 3.0])))
      5.0
    """
    check_hyperparam("with_regularizer", weight=weight)

    def change(loss, aux, params):
        return _plus(loss, weight, _scalar("penalty_fn", penalty_fn(params)))

    return _changed(loss_fn, has_aux, change)


@catalogued(
    title="Small-scale proxies for large-scale Transformer training instabilities",
    arxiv="2309.14322",
    kind="helper",
    needs=("loss_fn",),
    variant="the mean of `z_loss` over the rows that count",
    compared="`cross_entropy_with_z_loss`",
    example=lambda: {"loss_fn": lambda w: (jnp.sum(w**2), w)},
)
def with_z_loss(
    loss_fn: LossFn,
    *,
    coef: chex.Numeric = 1e-4,
    logits_of: Callable[[Any], jax.Array] | None = None,
    where_of: Callable[[Any], jax.Array] | None = None,
) -> LossFn:
    r"""Add the mean of `z_loss` to a loss function that returns its logits too.

    .. math:: L + c\; \mathrm{mean}\, (\log Z)^2

    Args:
      loss_fn: ``(params, *args) -> (loss, aux)``, where aux are the logits or holds
        them.
      coef: c, 0 or more. 1e-4 is the paper's and PaLM's.
      logits_of: ``aux -> logits`` [..., classes]; None takes aux itself.
      where_of: ``aux -> mask`` [...] of the rows that count (not padding); None takes
        all.

    Returns:
      A function of the same arguments that returns ``(loss, aux)``.

    Raises:
      AssertionError: at the call, if the loss is no scalar, or shapes do not fit.
      ValueError: for a negative `coef`.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> def loss_fn(logits):
      ...     return jnp.sum(logits), logits
      >>> loss, logits = ox.losses.with_z_loss(loss_fn, coef=1.0)(jnp.zeros((3, 1)))
      >>> print(loss)
      0.0
    """
    check_hyperparam("with_z_loss", low=0.0, coef=coef)

    def change(loss, aux, params):
        rows = z_loss(aux if logits_of is None else logits_of(aux), coef=1.0)
        where = None if where_of is None else where_of(aux)
        return _plus(loss, coef, masked_mean(rows, where, axis=None))

    return _changed(loss_fn, True, change)


@catalogued(
    title="Penalizing Gradient Norm for Efficiently Improving Generalization in Deep "
    "Learning",
    arxiv="2202.03599",
    kind="helper",
    needs=("loss_fn",),
    variant="exact, through the gradient; the paper approximates that by a difference",
    compared="closed form on a quadratic",
    example=lambda: {"loss_fn": _square, "weight": 0.1},
)
def with_gradient_penalty(
    loss_fn: LossFn,
    *,
    weight: chex.Numeric,
    squared: bool = False,
    has_aux: bool = False,
) -> LossFn:
    r"""Prefer flat places: add the norm of the loss's own gradient.

    .. math:: L + \lambda\, \|\nabla_{\text{params}} L\|

    Its gradient has the Hessian in it: :math:`\nabla L + \lambda\, H \nabla L /
    \|\nabla L\|`. For a penalty on gradients with respect to inputs, see the critics of
    GANs.

    Args:
      loss_fn: ``(params, *args) -> loss``, a scalar that can be differentiated twice.
      weight: lambda, 0 or more; the paper searches about 0.1.
      squared: whether to add the square of the norm, which is what gradient descent
        does by itself with its step size over 4 as the weight.
      has_aux: whether `loss_fn` returns ``(loss, aux)``; the result does then too.

    Returns:
      A function of the same arguments. Its gradient costs about three of `loss_fn`; at
      a minimum it is finite.

    Raises:
      AssertionError: at the call, if the loss is no scalar.
      ValueError: for a negative weight.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> def loss_fn(w):
      ...     return jnp.sum(w**2) / 2
      >>> flat = ox.losses.with_gradient_penalty(loss_fn, weight=0.1)
      >>> print(flat(jnp.array([3.0, 4.0])))
      13.0
    """
    check_hyperparam("with_gradient_penalty", low=0.0, weight=weight)

    def wrapped(params: Any, *args: Any, **kwargs: Any) -> Any:
        def loss_and_aux(params):
            out = loss_fn(params, *args, **kwargs)
            loss, aux = out if has_aux else (out, None)
            return _scalar("loss_fn", loss), aux

        (loss, aux), grads = jax.value_and_grad(loss_and_aux, has_aux=True)(params)
        leaves = jax.tree.leaves(grads)
        wide = computing_dtype(*leaves)
        norms = [norm_of(leaf.astype(wide), axis=None) for leaf in leaves]
        norm = norm_of(jnp.stack(norms))
        loss = _plus(loss, weight, norm**2 if squared else norm)
        return (loss, aux) if has_aux else loss

    return wrapped
