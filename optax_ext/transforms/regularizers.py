r"""Links that add the gradient of a regulariser to the gradient of the loss.

They belong where `optax.add_decayed_weights` does, and the place decides what they are.
In front of a preconditioner (Adam's second moment) they are terms of the loss, scaled
with it; behind it, before the learning rate, they are decoupled.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam, check_params
from optax_ext._core.leaves import at_step, init_leaves, map_leaves, next_count
from optax_ext._core.trees import flatten_like, is_hole, is_unit
from optax_ext.losses.orthogonality import orthogonal_penalty


class AnchorDecayState(NamedTuple):
    """State of `add_anchor_decay`; `fisher` is None where all weights are 1."""

    count: jax.Array
    anchor: optax.Params
    fisher: Any


@catalogued(
    title="A Closer Look at Rehearsal-Free Continual Learning",
    arxiv="2203.17269",
    kind="link",
    needs=("params",),
    state="1 (anchor), or 2 with a Fisher information",
    slots=1,
    variant="L2, or EWC with a diagonal Fisher information, with the factor 1/2 of the "
    "penalty; mammoth's e_lambda is half this strength.",
    compared="golden add_anchor_decay; optax.add_decayed_weights for an anchor of 0",
    example=lambda: {"strength": 0.1},
)
def add_anchor_decay(
    strength: optax.ScalarOrSchedule,
    anchor: Any = None,
    fisher: Any = None,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Pull parameters to earlier values: weight decay with another centre.

    .. math:: \text{out} = u + \lambda F (x - a)

    It is the gradient of `losses.anchor_penalty`. The state holds a and F as data:
    checkpoints carry them, and for a new task ``optax.tree.set(state, anchor=...)``
    puts others in their place.

    Args:
      strength: lambda, or a schedule of it; it has no default in the paper.
      anchor: a, a tree like the parameters; None takes those that ``init`` sees. Inside
        `bucketed` only None will do.
      fisher: F, a tree like the parameters, for example of `diagonal_fisher`; None is 1
        everywhere.
      mask: which leaves are pulled: tree of booleans, or function of params.

    Returns:
      A link whose state is the anchor, and the Fisher information where given.

    Raises:
      ValueError: for trees that differ, or where `update` is called without params.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> tx = ox.add_anchor_decay(0.5, anchor=jnp.array([1.0, 1.0]))
      >>> x = jnp.array([1.0, 3.0])
      >>> print(tx.update(jnp.zeros(2), tx.init(x), x)[0])
      [0. 1.]
    """
    owner = "add_anchor_decay"
    check_hyperparam(owner, strength=strength)

    def copied(params, tree):
        """Float32 copies of a tree, with holes where the parameters have them."""
        leaves, (given,), treedef = flatten_like(params, tree, owner=owner)
        pairs = zip(leaves, given, strict=True)
        seen = treedef.unflatten([p if is_hole(p) else x for p, x in pairs])
        return init_leaves(lambda x: (x,), seen, 1)[0]

    def init(params):
        at = copied(params, params if anchor is None else anchor)
        weights = None if fisher is None else copied(params, fisher)
        return AnchorDecayState(jnp.zeros([], jnp.int32), at, weights)

    def update(updates, state, params=None, **extra):
        del extra
        check_params(owner, params)
        count = next_count(state.count)

        def rule(u, slots, x, a, f):
            pull = at_step(strength, count.astype(u.real.dtype)) * (x - a)
            return u + (pull if f is None else f * pull), slots

        others = (params, state.anchor, state.fisher)
        out, _ = map_leaves(rule, updates, (), others, owner=owner)
        return out, state._replace(count=count)

    link = optax.GradientTransformationExtraArgs(init, update)
    return link if mask is None else optax.masked(link, mask)


@catalogued(
    title="Existence, Stability and Scalability of Orthogonal Convolutional Neural "
    "Networks",
    arxiv="2108.05623",
    kind="link",
    needs=("params",),
    slots=0,
    variant="deel-lip's penalties; kernels of even size too.",
    compared="golden add_orthogonal_regularizer",
    example=lambda: {"strength": 0.01},
)
def add_orthogonal_regularizer(
    strength: float = 0.1, stride: Any = 1, mask: Any = None
) -> optax.GradientTransformationExtraArgs:
    r"""Pull convolutions and dense layers to near-isometries.

    .. math:: \text{out} = u + \lambda\, \partial L / \partial x,

    with L from `losses.orthogonal_conv_penalty` for leaves of rank 4,
    [k, k, C, M], and from `losses.orthogonal_dense_penalty` for those of rank 2. Others
    pass. Embeddings are of rank 2: mask them, and grouped and transposed convolutions,
    whose leaves look the same and are not.

    Args:
      strength: lambda. 0.1 as in the official code, whose range is 0.1 to 1.
      stride: of the convolutions, an int or a tree of ints like the parameters (a
        prefix will do).
      mask: which leaves are treated: tree of booleans, or function of params.

    Returns:
      A link without state.

    Raises:
      ValueError: for a convolution that is not square, or where `update` is called
        without params.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> tx = ox.add_orthogonal_regularizer(0.5)
      >>> x = jnp.array([[2.0, 0.0], [0.0, 1.0]])
      >>> print(tx.update(jnp.zeros((2, 2)), tx.init(x), x)[0])
      [[12.  0.]
       [ 0.  0.]]
    """
    owner = "add_orthogonal_regularizer"
    check_hyperparam(owner, strength=strength)

    def rule(u, slots, x, step):
        if x.ndim == 4 and x.shape[0] != x.shape[1]:
            raise ValueError(
                f"a kernel must be square, got {x.shape}: mask it with mask="
            )
        if x.shape != u.shape:
            raise ValueError(
                f"the gradient has shape {u.shape}, the parameter {x.shape}"
            )
        return u + strength * jax.grad(orthogonal_penalty)(x, step), slots

    def update(updates, state, params=None, **extra):
        del extra
        check_params(owner, params)
        steps = jax.tree.map(
            lambda s, tree: jax.tree.map(lambda _: s, tree, is_leaf=is_unit),
            stride,
            params,
        )
        return map_leaves(rule, updates, (), (params, steps), owner=owner)[0], state

    link = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    return link if mask is None else optax.masked(link, mask)
