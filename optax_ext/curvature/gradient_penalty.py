r"""Gradient regularisation: flat places by the price of one more gradient.

A penalty on the squared norm of the gradient has the gradient

.. math:: \nabla \tfrac{\gamma}{2} \|\nabla L\|^2 = \gamma\, H \nabla L

which is a slope of the gradient along itself. A finite difference takes it from one
gradient at a point uphill or downhill; a product with the Hessian takes it exactly.
Uphill, normalised and with gamma = eps, it is sharpness-aware minimisation
(`optax_ext.sharpness_aware`). The penalty as a loss, for a caller that differentiates
it, is `optax_ext.losses.with_gradient_penalty`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_choice, check_hyperparam, check_params
from optax_ext._core.extra_args import require
from optax_ext._core.geometry import tree_length
from optax_ext._core.points import (
    on_trainable,
    plus,
    trainable,
    unit,
)
from optax_ext._core.trees import computing_dtype
from optax_ext._core.views import full_precision
from optax_ext.curvature.products import hvp

_PAPER: dict[str, Any] = {
    "title": "Understanding Gradient Regularization in Deep Learning: Efficient "
    "Finite-Difference Computation and Implicit Bias",
    "arxiv": "2210.02720",
}
MODES = ("forward", "backward", "double_backprop")


def _check(owner: str, gamma: Any, eps: Any, mode: str) -> None:
    check_choice(owner, "mode", mode, MODES)
    check_hyperparam(owner, low=0.0, gamma=gamma)
    check_hyperparam(owner, low=0.0, open_low=True, eps=eps)


def _regularized(
    f: Callable[[Any], jax.Array], x: Any, g: Any, d: Any, gamma: Any, eps: Any, mode
) -> Any:
    """The gradient g of f at x, plus gamma times its slope along d."""
    if mode == "double_backprop":
        return plus(g, gamma, hvp(f)(x, d))
    sign = 1 if mode == "forward" else -1
    there = jax.grad(f)(plus(x, sign * eps, d))
    # gamma / eps first: where they are equal, this is the gradient there.
    return plus(g, sign * (gamma / eps), jax.tree.map(jnp.subtract, there, g))


@catalogued(
    **_PAPER,
    kind="link",
    needs=("params", "value_fn"),
    slots=0,
    variant="forward and backward differences, or one Hessian-vector product.",
    compared="goldens grad_reg_forward, grad_reg_backward, grad_reg_double_backprop",
    example=lambda: {"gamma": 1e-3, "eps": 0.01, "normalize": True},
)
def add_gradient_norm_penalty(
    gamma: float = 0.05,
    eps: float = 0.05,
    mode: str = "forward",
    normalize: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Add the gradient of a penalty on the norm of the gradient.

    With g the incoming gradient at x, and d = g:

    .. math::
      \text{out} = g + \gamma \cdot \begin{cases}
        (\nabla L(x + \epsilon d) - g) / \epsilon & \text{"forward"} \\
        (g - \nabla L(x - \epsilon d)) / \epsilon & \text{"backward"} \\
        H d & \text{"double\_backprop"}
      \end{cases}

    The updates must be the raw gradient: put the link first. It costs one gradient, or
    one product with the Hessian (about two). In bfloat16, where a small displacement
    is lost in rounding, take "double_backprop".

    Args:
      gamma: strength, 0 or more; 1e-3 to 1e-1 is usual, tune it with `eps`.
      eps: displacement in units of d, above 0; 1e-2 to 1e-1 is usual.
      mode: "forward", "backward" or "double_backprop".
      normalize: whether :math:`d = g / \|g\|`, over all leaves (0 where g is 0): the
        penalty is then :math:`\gamma \|g\|`, not :math:`\gamma \|g\|^2 / 2`.

    Returns:
      A link without state that needs params and ``value_fn``.

    Raises:
      ValueError: for hyper-parameters outside their range or an unknown mode; at trace
        time without params or ``value_fn``.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> f = lambda x: jnp.sum(x**2) / 2
      >>> tx = ox.add_gradient_norm_penalty(gamma=0.5)
      >>> x = jnp.array([1.0, -2.0])  # the gradient of f is x, its Hessian 1
      >>> print(tx.update(x, tx.init(x), x, value_fn=f)[0].round(4))
      [ 1.5 -3. ]
    """
    owner = "add_gradient_norm_penalty"
    _check(owner, gamma, eps, mode)

    def update(updates, state, params=None, **extra):
        check_params(owner, params)
        f = on_trainable(require(owner, extra, "value_fn"), params, owner)
        x = trainable(updates, params, owner)
        d = unit(updates) if normalize else updates
        return _regularized(f, x, updates, d, gamma, eps, mode), state

    return full_precision(
        optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    )


@catalogued(
    **_PAPER,
    kind="helper",
    needs=("loss_fn",),
    variant="the squared norm; forward and backward differences, or one "
    "Hessian-vector product.",
    compared="`add_gradient_norm_penalty`; `optax_ext.losses.with_gradient_penalty`",
    example=lambda: {"loss_fn": lambda w: jnp.sum(w**2)},
)
def gradient_regularized_value_and_grad(
    loss_fn: Callable[..., Any],
    gamma: float = 0.05,
    eps: float = 0.05,
    mode: str = "forward",
    has_aux: bool = False,
) -> Callable[..., Any]:
    r"""`jax.value_and_grad` with a penalty on the squared norm of the gradient.

    .. math:: L + \tfrac{\gamma}{2} \|\nabla L\|^2

    and the gradient of that, as `add_gradient_norm_penalty` takes it, for loops that
    make their own gradients. It costs one gradient or one Hessian-vector product more.

    Args:
      loss_fn: ``(params, *args) -> loss``, a scalar.
      gamma: strength, 0 or more.
      eps: displacement in units of the gradient, above 0.
      mode: "forward", "backward" or "double_backprop".
      has_aux: whether `loss_fn` returns ``(loss, aux)``. aux is that at params.

    Returns:
      A function of the same arguments that returns ``(value, grads)``, or
      ``((value, aux), grads)``.

    Raises:
      ValueError: for hyper-parameters outside their range or an unknown mode.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> value_and_grad = ox.gradient_regularized_value_and_grad(
      ...     lambda w: jnp.sum(w**2) / 2, gamma=0.5)
      >>> value, grads = value_and_grad(jnp.array([1.0, -1.0]))
      >>> print(value, grads.round(4))
      1.5 [ 1.5 -1.5]
    """
    owner = "gradient_regularized_value_and_grad"
    _check(owner, gamma, eps, mode)

    def wrapped(params: Any, *args: Any, **kwargs: Any) -> Any:
        def loss(p):
            out = loss_fn(p, *args, **kwargs)
            return out if has_aux else (out, None)

        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(params)
        g = jax.tree.map(lambda x: x.astype(computing_dtype(x)), grads)
        f = on_trainable(lambda p: loss(p)[0], params, owner)
        out = _regularized(f, trainable(g, params, owner), g, g, gamma, eps, mode)
        value = value.astype(computing_dtype(value))
        penalty = tree_length(g).astype(value.dtype) ** 2 / 2
        value = value + jnp.asarray(gamma, value.dtype) * penalty
        out = jax.tree.map(lambda x, g: x.astype(g.dtype), out, grads)
        return ((value, aux), out) if has_aux else (value, out)

    return wrapped
