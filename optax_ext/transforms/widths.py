"""Learning rates that follow the width of a layer.

A unit-size step (Adam's, Lion's) on every weight moves a pre-activation by n times its
size where weights and activations are aligned, by its root where they are not; n is the
number of inputs. To keep that movement the same at any width, the steps of a layer are
multiplied by n^-1 or n^-1/2, relative to the width at which the rate was tuned.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_choice, check_hyperparam, check_params
from optax_ext._core.leaves import map_leaves
from optax_ext._core.trees import Bucket, is_unit, treated

_EXPONENTS: dict[str, dict[str, float]] = {
    "full": {"embedding": 0.0, "hidden": 1.0, "readout": 1.0},
    "none": {"embedding": 0.0, "hidden": 0.5, "readout": 0.5},
}


def _labels_of(labels: Any, params: Any) -> Any:
    """A label for each leaf; the labels of a stack are those of its leaves."""
    labels = labels(params) if callable(labels) else labels
    plain = jax.tree.map(
        lambda x: x.stack if isinstance(x, Bucket) else x, labels, is_leaf=is_unit
    )
    return treated(plain, params)


@catalogued(
    title="Scaling Exponents Across Parameterizations and Optimizers",
    arxiv="2407.05872",
    kind="link",
    needs=("params",),
    slots=0,
    variant="exponents of Adam-type updates in the standard parameterization.",
    compared="closed form",
    example=lambda: {"labels": lambda params: "hidden"},
)
def scale_by_width_exponents(
    labels: Any,
    alignment: str = "full",
    exponents: Mapping[str, float] | None = None,
    base_width: float = 128.0,
    fan_in: Callable[[jax.Array], int] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiply each update by a power of its layer's width.

    .. math:: \text{out} = u\, (n / n_0)^{-c[\text{label}]}

    =========== ========= ====== =======
    alignment   embedding hidden readout
    =========== ========= ====== =======
    "full"      0         1      1
    "none"      0         1/2    1/2
    =========== ========= ====== =======

    Place it behind a direction of unit size (Adam, Lion) and tune the learning rate at
    the width :math:`n_0`: it carries over to others.

    Args:
      labels: tree of strings (a prefix of the parameters will do), or a function of
        params that returns one, as in `optax.partition`.
      alignment: "full" where activations and updates are assumed to be aligned, "none"
        where they are not.
      exponents: c by label, instead of or beside those of the table. A label that is in
        neither has exponent 0.
      base_width: n_0, the width at which the learning rate was tuned.
      fan_in: parameter -> its number of inputs n. By default the last axis but one; an
        update of a parameter with fewer axes passes unchanged.

    Returns:
      A link without state.

    Raises:
      ValueError: for an unknown alignment, a width that is not above 0, or if `update`
        is called without params.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> tx = ox.scale_by_width_exponents({"w": "hidden"}, base_width=4)
      >>> params = {"w": jnp.ones((8, 1))}
      >>> print(tx.update(params, tx.init(params), params)[0]["w"][0])
      [0.5]
    """
    owner = "scale_by_width_exponents"
    check_choice(owner, "alignment", alignment, _EXPONENTS)
    check_hyperparam(owner, low=0.0, open_low=True, base_width=base_width)
    powers: dict[str, Any] = {**_EXPONENTS[alignment], **(exponents or {})}
    check_hyperparam(owner, **{f"exponents of {k!r}": c for k, c in powers.items()})

    def rule(u, slots, p, label):
        if fan_in is None and p.ndim < 2:
            return u, slots
        n = p.shape[-2] if fan_in is None else fan_in(p)
        check_hyperparam(owner, low=0.0, open_low=True, fan_in=n)
        return u * (n / base_width) ** -powers.get(label, 0.0), slots

    def update(updates, state, params=None, **extra):
        del extra
        check_params(owner, params)
        others = (params, _labels_of(labels, params))
        return map_leaves(rule, updates, (), others)[0], state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
