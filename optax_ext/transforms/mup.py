r"""Learning rates for each leaf that stay right when a model is made wider.

Under the maximal update parametrization every activation moves by as much in a step
whatever the width, so that hyper-parameters found on a narrow model hold on a wide one.
The optimizer's half of it is one factor a leaf, `scale_by_mup`; `mup_widths` reads the
kinds of leaves and their widths off the shapes of two models. The model's half, for
hidden layers of m times the base width, is: logits times 1/m (or ``readout="init"``),
hidden weights of variance 1/fan_in, attention logits over d instead of its root.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_choice, check_hyperparam
from optax_ext._core.leaves import map_leaves
from optax_ext._core.trees import is_unit

_TITLE = (
    "Research without Re-search: Maximal Update Parametrization Yields Accurate Loss "
    "Prediction across Scales"
)
_ARXIV = "2304.06875"
_KINDS = ("hidden", "input", "vector", "output", "fixed")


def _factor(kind: str, m_in: Any, m_out: Any, optimizer: str, readout: str) -> Any:
    """What the update of a leaf is multiplied by."""
    adaptive = optimizer == "adam"
    if kind == "hidden":
        return 1 / m_in if adaptive else m_out / m_in
    if kind in ("input", "vector"):
        return 1.0 if adaptive else m_out
    if kind == "output" and readout == "init":
        return 1 / m_in
    return m_in if kind == "output" and not adaptive else 1.0


@catalogued(
    title=_TITLE,
    arxiv=_ARXIV,
    kind="link",
    slots=0,
    variant="the rules of microsoft/mup; base width 1 gives muLO's (arXiv:2406.00153).",
    compared="goldens mup_adamw, mup_sgd (MuAdamW, MuSGD)",
    example=lambda: {"kinds": "hidden", "width_in": 4.0},
)
def scale_by_mup(
    kinds: Any,
    width_in: Any,
    width_out: Any = None,
    optimizer: str = "adam",
    readout: str = "multiplier",
) -> optax.GradientTransformationExtraArgs:
    r"""Multiply each leaf's update by its factor of the maximal update parametrization.

    With the width of a leaf's input and output axis as multiples of the base model's:

    ========================  ============================  ==================
    kind                      adam                          sgd
    ========================  ============================  ==================
    hidden                    1 / m_in                      m_out / m_in
    input, vector             1                             m_out
    output, "multiplier"      1                             m_in
    output, "init"            1 / m_in                      1 / m_in
    fixed                     1                             1
    ========================  ============================  ==================

    Hidden: both axes grow; input (embedding) and vector (bias, scale of a norm): the
    output axis alone; output: the input axis alone; fixed: none. Put it behind
    ``scale_by_adam`` and before `optax.add_decayed_weights`: decay before it would
    shrink with the width.

    Args:
      kinds: tree like params of kinds, or one kind for all leaves.
      width_in: tree like params of m_in (1 where the axis does not grow), or a number.
      width_out: the same of m_out; None takes `width_in`.
      optimizer: "adam" for methods that normalise the gradient, else "sgd".
      readout: "multiplier" if the model multiplies its logits by 1/m_in, "init" if it
        does not and starts its output layer with 1/m_in^2 of the base's variance.

    Returns:
      A link without state.

    Raises:
      ValueError: for unknown names or widths that are not above 0; at trace time for
        trees that do not fit the updates (inside `bucketed` only one kind and one
        width for all leaves can).

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> kinds = {"kernel": "hidden", "bias": "vector"}
      >>> widths = {"kernel": 4.0, "bias": 4.0}
      >>> tx = ox.scale_by_mup(kinds, widths)
      >>> g = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
      >>> print(tx.update(g, tx.init(g))[0]["kernel"][0])
      [0.25 0.25]
    """
    check_choice("scale_by_mup", "optimizer", optimizer, ("adam", "sgd"))
    check_choice("scale_by_mup", "readout", readout, ("multiplier", "init"))
    trees = kinds, width_in, width_in if width_out is None else width_out
    for kind in jax.tree.leaves(kinds):
        check_choice("scale_by_mup", "kinds", kind, _KINDS)
    for name, tree in zip(("width_in", "width_out"), trees[1:], strict=True):
        for width in jax.tree.leaves(tree):
            check_hyperparam("scale_by_mup", low=0.0, open_low=True, **{name: width})

    def rule(u, slots, kind, m_in, m_out):
        factor = _factor(kind, m_in, m_out, optimizer, readout)
        return u * jnp.asarray(factor, u.real.dtype), slots

    def update(updates, state, params=None, **extra):
        del params, extra
        each = [_for_each_leaf(tree, updates) for tree in trees]
        scaled, _ = map_leaves(rule, updates, (), tuple(each), owner="scale_by_mup")
        return scaled, state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update
    )


def _for_each_leaf(tree: Any, updates: Any) -> Any:
    """A tree like `updates` of one value, if `tree` is one."""
    if jax.tree.structure(tree) == jax.tree.structure(0):
        return jax.tree.map(lambda _: tree, updates, is_leaf=is_unit)
    return tree


@catalogued(
    title=_TITLE,
    arxiv=_ARXIV,
    kind="helper",
    variant="the infinite axes of microsoft/mup, read off shapes.",
    compared="goldens mup_adamw, mup_sgd",
    example=lambda: {
        "params": {"kernel": jax.ShapeDtypeStruct((4, 8), "float32")},
        "base_params": {"kernel": jax.ShapeDtypeStruct((4, 2), "float32")},
    },
)
def mup_widths(params: Any, base_params: Any) -> tuple[Any, Any, Any]:
    r"""Kinds and widths for `scale_by_mup`, from the shapes of two models.

    .. math:: m_\text{in} = \frac{n_\text{in}}{n_\text{in, base}}, \qquad
      m_\text{out} = \frac{n_\text{out}}{n_\text{out, base}}

    Axes are those of Flax: Dense [in, out], Conv [height, width, in, out]; a vector has
    an output axis only.

    Args:
      params: the model's parameters, or their `jax.ShapeDtypeStruct`.
      base_params: those of the model on which the hyper-parameters were found.

    Returns:
      Trees like `params` of kinds, of m_in and of m_out.

    Raises:
      ValueError: for trees or ranks that differ, or another axis that grows.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> wide = {"embed": jnp.ones((5, 8)), "kernel": jnp.ones((8, 8))}
      >>> base = {"embed": jnp.ones((5, 2)), "kernel": jnp.ones((2, 2))}
      >>> ox.mup_widths(wide, base)[0]
      {'embed': 'input', 'kernel': 'hidden'}
    """

    def of_leaf(path, leaf, base):
        shape, old = leaf.shape, base.shape
        if len(shape) != len(old) or shape[:-2] != old[:-2] or 0 in old:
            raise ValueError(
                f"mup_widths: leaf {jax.tree_util.keystr(path)} grows from {old} to "
                f"{shape}: only the last two axes, in and out, may grow"
            )
        ratios = [n / m for n, m in zip(shape[-2:], old[-2:], strict=True)]
        m_in, m_out = [1.0, 1.0, *ratios][-2:]
        if m_in != 1:
            kind = "output" if m_out == 1 else "hidden"
        elif m_out != 1:
            kind = "input" if len(shape) > 1 else "vector"
        else:
            kind = "fixed"
        return kind, m_in, m_out

    outer, base = jax.tree.structure(params), jax.tree.structure(base_params)
    if outer != base:
        raise ValueError(f"mup_widths: trees of two structures, {outer} and {base}")
    both = jax.tree_util.tree_map_with_path(of_leaf, params, base_params)
    found = outer.flatten_up_to(both)
    kinds, width_in, width_out = (
        outer.unflatten([leaf[i] for leaf in found]) for i in range(3)
    )
    return kinds, width_in, width_out
