r"""Links that keep weights on a sphere, or gradients in its tangent space.

A network that normalises after a weight w does not see :math:`|w|`, yet training
changes it: logits grow although no decision does, and the angle that a step turns w by
depends on a length that nobody chose. `perp_grad` takes the component along w out of
each gradient. `project_to_init_norm` puts each weight back on the sphere that it was
initialised on, so that the effective learning rate is the schedule's. The wrapper
`optax_ext.lawn` does both after a phase of free training.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import (
    check_choice,
    check_hyperparam,
    check_interval,
    check_params,
)
from optax_ext._core.geometry import length, to_sphere
from optax_ext._core.leaves import init_leaves, leafwise, map_leaves, next_count
from optax_ext._core.trees import computing_dtype, treated

_NAP = "Normalization and effective learning rates in reinforcement learning"


@catalogued(
    title="Grokking at the Edge of Numerical Stability",
    arxiv="2501.04697",
    kind="link",
    needs=("params",),
    slots=0,
    variant="all leaves, rank 1 included, and a length that is restored, as released; "
    "without the rescaling of what is rounding error only.",
    compared="goldens perp_grad_sgd, perp_grad_adamw (official code)",
)
def perp_grad(
    eps: float = 1e-30, renormalize: bool = True, mask: Any = None
) -> optax.GradientTransformationExtraArgs:
    r"""Remove from each gradient what is parallel to its own weights.

    .. math::
      h = g - \frac{\langle w, g \rangle}{\langle w, w \rangle + \epsilon}\, w, \qquad
      \text{out} = h\, \frac{|g|}{|h| + \epsilon}

    per leaf, so that training cannot lower the loss by scaling logits up. It comes
    before the optimizer. Zero weights leave the gradient as it is. Where h is only
    rounding error (:math:`|h| \le 16\,\text{ulp}\,|g|`) it is not scaled up.

    Args:
      eps: added to the two denominators (official code).
      renormalize: whether to restore the length of the gradient.
      mask: which leaves are treated: tree of booleans, or function of params; None
        treats all.

    Returns:
      A link without state.

    Raises:
      ValueError: if `update` is called without params.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> tx, w = ox.perp_grad(), jnp.array([0.0, 2.0])
      >>> print(tx.update(jnp.array([3.0, 4.0]), tx.init(w), w)[0])
      [5. 0.]
    """
    check_hyperparam("perp_grad", low=0.0, eps=eps)

    def init(w):
        del w
        return ()

    def update(g, slots, w, t):
        del t
        norm = length(w)
        norm = jnp.where(norm > 0, norm, 1)
        unit = w / norm
        # <w, g> / (<w, w> + eps), without the square of a large or a small norm.
        h = g - unit * (jnp.sum(unit * g) / (1 + eps / norm / norm))
        if renormalize:
            before, after = length(g), length(h)
            real = after > 16 * jnp.finfo(g.dtype).eps * before
            h = jnp.where(real, h * (before / (jnp.where(real, after, 1) + eps)), h)
        return h, slots

    link = leafwise(optax.EmptyState, init, update, needs_params=True)
    return link if mask is None else optax.masked(link, mask)


class InitNormState(NamedTuple):
    """State of `project_to_init_norm`: steps taken, and lengths of the leaves."""

    count: jax.Array
    norm: Any


@catalogued(
    title=_NAP,
    arxiv="2407.01800",
    kind="link",
    needs=("params",),
    state="0 (1 scalar a leaf)",
    slots=0,
    variant="every leaf of rank 2 or more, by its whole norm; scales and offsets of "
    "normalisation layers, which the paper treats on their own, are left alone.",
    compared="golden project_to_init_norm; lengths after the step",
)
def project_to_init_norm(
    mask: Any = None, every: int = 1, axis: Any = None, eps: float = 1e-12
) -> optax.GradientTransformationExtraArgs:
    r"""Scale each weight back to its initial length after the step.

    .. math:: \text{out} = |w_0| \frac{w + u}{|w + u|} - w

    It must be the last link, behind the learning rate: u is the step that would be
    taken. With normalisation layers behind the weights the function stays the same, and
    the effective learning rate is the schedule's (see `effective_learning_rate`).

    Args:
      mask: which leaves are treated: tree of booleans, or function of params; None
        treats leaves of rank 2 and more.
      every: steps from one projection to the next; the first is step `every`.
      axis: axes that a length is taken over, an int or a tuple; None is the whole leaf.
      eps: lengths up to eps, at init or after the step, leave the step as it is.

    Returns:
      A link for the end of a chain.

    Raises:
      ValueError: for `every` below 1, or where `update` is called without params.

    Example:
      >>> import jax.numpy as jnp, optax, optax_ext as ox
      >>> tx = optax.chain(optax.sgd(1.0), ox.project_to_init_norm())
      >>> w = jnp.array([[3.0, 4.0]])
      >>> u, _ = tx.update(jnp.array([[3.0, 0.0]]), tx.init(w), w)
      >>> print(optax.apply_updates(w, u))
      [[0. 5.]]
    """
    owner = "project_to_init_norm"
    check_interval(owner, every=every)
    check_hyperparam(owner, low=0.0, eps=eps)

    def size(w):
        return (length(w, axis, keepdims=axis is not None),)

    def init(params):
        return InitNormState(jnp.zeros([], jnp.int32), *init_leaves(size, params, 1))

    def update(updates, state, params: Any = None, **extra):
        del extra
        check_params(owner, params)
        count = next_count(state.count)
        due = count % every == 0

        def rule(u, slots, w, norm, keep):
            if not keep:
                return u, slots
            return jnp.where(due, to_sphere(u, w, norm, axis, eps), u), slots

        others = (params, state.norm, treated(mask, params))
        updates, _ = map_leaves(rule, updates, (), others, owner=owner)
        return updates, state._replace(count=count)

    return optax.GradientTransformationExtraArgs(init, update)


@catalogued(
    title=_NAP,
    arxiv="2407.01800",
    kind="helper",
    variant="of one leaf, by its whole norm.",
    compared="closed form",
    example=lambda: {"params": {"w": jnp.ones((2, 2))}, "learning_rate": 0.1},
)
def effective_learning_rate(params: Any, learning_rate: Any, kind: str = "sgd") -> Any:
    r"""The learning rate at which each normalised weight really turns.

    .. math:: \eta / |w|^2 \ (\text{"sgd"}), \qquad \eta / |w| \ (\text{"adam"})

    Args:
      params: tree of weights.
      learning_rate: the nominal rate eta, a scalar.
      kind: "sgd" where steps are as long as gradients, which shrink as the weight
        grows; "adam" where the length of a step does not depend on the gradient's.

    Returns:
      Tree of scalars, infinite for zero weights.

    Raises:
      ValueError: for an unknown kind.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> print(ox.effective_learning_rate(jnp.array([[3.0, 4.0]]), 0.1, "adam"))
      0.02
    """
    check_choice("effective_learning_rate", "kind", kind, ("sgd", "adam"))

    def of_leaf(w):
        w = w.astype(computing_dtype(w))
        norm = length(w)
        rate = jnp.asarray(learning_rate, w.dtype) / norm
        return rate / norm if kind == "sgd" else rate

    return jax.tree.map(of_leaf, params)
