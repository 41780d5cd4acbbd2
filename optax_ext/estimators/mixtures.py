r"""Mixtures of models and of examples, against over-confidence.

Fine-tuning improves a model where the new data are, and harms it elsewhere. `wise_ft`
averages its parameters with those it started from. A fine-tuned half that is too sure
of itself drowns the other: fine-tune with `mixup`, smoothed labels
(`optax.smooth_labels`), or both, then average. That is all of BANG.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam
from optax_ext._core.trees import (
    computing_dtype,
    flatten_like,
    is_hole,
    leaf_path,
    naming,
)

_TITLE = "Spurious Feature Diversification Improves Out-of-distribution Generalization"


@catalogued(
    title=_TITLE,
    arxiv="2309.17230",
    kind="helper",
    needs=("pretrained", "finetuned"),
    variant="WiSE-FT's merge, plain or weighted by Fisher information",
    compared="golden wise_ft; optax.incremental_update",
    example=lambda: {
        "pretrained": {"w": jnp.array([1.0, 2.0])},
        "finetuned": {"w": jnp.array([3.0, 2.0])},
    },
)
def wise_ft(
    pretrained: Any,
    finetuned: Any,
    alpha: chex.Numeric = 0.5,
    fisher_pretrained: Any = None,
    fisher_finetuned: Any = None,
    fisher_floor: chex.Numeric = 1e-8,
) -> Any:
    r"""Average the parameters of a model before and after fine-tuning.

    .. math::
      (1 - w)\, x_0 + w\, x_1, \qquad w = \alpha \quad\text{or}\quad
      w = \frac{\alpha \max(F_1, f)}{(1 - \alpha) \max(F_0, f) + \alpha \max(F_1, f)}

    Without Fisher information it is `optax.incremental_update`.

    Args:
      pretrained: x_0, a tree of arrays.
      finetuned: x_1, a tree like it. Its integer leaves are copied.
      alpha: weight of the fine-tuned half, in [0, 1]; 0.5 as in the official code. At
        0 and 1 the result is that half, bit by bit.
      fisher_pretrained: F_0, a tree like them; see `diagonal_fisher`.
      fisher_finetuned: F_1, given with `fisher_pretrained` or not at all.
      fisher_floor: f > 0, the least Fisher information; 1e-8 as in the official code.

    Returns:
      A tree like `finetuned`, in its dtypes.

    Raises:
      ValueError: for trees that differ, one Fisher tree without the other, or a
        hyper-parameter outside its interval.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> before, after = {"w": jnp.array([0.0, 4.0])}, {"w": jnp.array([1.0, 2.0])}
      >>> print(ox.wise_ft(before, after, alpha=0.5)["w"])
      [0.5 3. ]
    """
    owner = "wise_ft"
    check_hyperparam(owner, low=0.0, high=1.0, alpha=alpha)
    check_hyperparam(owner, low=0.0, open_low=True, fisher_floor=fisher_floor)
    if (fisher_pretrained is None) != (fisher_finetuned is None):
        raise ValueError(
            f"{owner}: pass both fisher_pretrained and fisher_finetuned, or neither"
        )

    def merged(y: Any, x: Any, f0: Any, f1: Any) -> Any:
        if is_hole(y) or not jnp.issubdtype(y.dtype, jnp.inexact):
            return y
        dtype = computing_dtype(y, x)
        x, wide = x.astype(dtype), y.astype(dtype)
        w = a = jnp.asarray(alpha, dtype)
        if f0 is not None:
            floor = jnp.asarray(fisher_floor, dtype)
            c0 = (1 - a) * jnp.maximum(f0.astype(dtype), floor)
            c1 = a * jnp.maximum(f1.astype(dtype), floor)
            w = c1 / (c0 + c1)
        mixed = jnp.where(a == 0, x, (1 - w) * x + w * wide)
        return jnp.where(a == 1, wide, mixed).astype(y.dtype)

    trees = (pretrained, fisher_pretrained, fisher_finetuned)
    leaves, rest, treedef = flatten_like(finetuned, *trees, owner=owner)
    out = []
    for i, arguments in enumerate(zip(leaves, *rest, strict=True)):
        with naming(owner, lambda i=i: leaf_path(finetuned, i)):
            out.append(merged(*arguments))
    return treedef.unflatten(out)


@catalogued(
    title=_TITLE,
    arxiv="2309.17230",
    kind="helper",
    needs=("key", "inputs", "targets"),
    variant="one share a batch, as in mixup's first code",
    compared="closed form for given draws; the mean over draws",
    example=lambda: {
        "key": jax.random.key(0),
        "inputs": jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]),
        "targets": jnp.eye(3),
    },
)
def mixup(
    key: jax.Array,
    inputs: jax.Array,
    targets: jax.Array,
    concentration: chex.Numeric = 0.2,
) -> tuple[jax.Array, jax.Array]:
    r"""Mix the examples of a batch with each other, inputs and targets alike.

    For a random permutation p of the batch and
    :math:`\lambda \sim \mathrm{Beta}(c, c)`,

    .. math::
      x_i \leftarrow \lambda x_i + (1 - \lambda) x_{p(i)}, \qquad
      y_i \leftarrow \lambda y_i + (1 - \lambda) y_{p(i)}.

    Args:
      key: for permutation and lambda.
      inputs: x, floats [B, ...].
      targets: y, probabilities [B, ..., classes], such as `jax.nn.one_hot` of labels.
      concentration: c > 0. Small values mix little; 0.2 is a customary choice, the
        paper's is not confirmed.

    Returns:
      Mixed inputs and targets, in their dtypes; for `optax.softmax_cross_entropy`.

    Raises:
      ValueError: for a concentration that is not positive, inputs or targets that are
        not floats, or batches that differ.

    Example:
      >>> import jax, jax.numpy as jnp, optax_ext as ox
      >>> x, y = ox.mixup(jax.random.key(0), jnp.ones((4, 2)), jnp.eye(4))
      >>> print(x[0], y.sum(-1))
      [1. 1.] [1. 1. 1. 1.]
    """
    check_hyperparam("mixup", low=0.0, open_low=True, concentration=concentration)
    for name, x in (("inputs", inputs), ("targets", targets)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"mixup: {name} must be floats, got {x.dtype}")
    if inputs.shape[:1] != targets.shape[:1]:
        raise ValueError(
            f"mixup: inputs have shape {inputs.shape}, targets {targets.shape}; the "
            "first axis is the batch"
        )
    dtype = computing_dtype(inputs, targets)
    for_order, for_share = jax.random.split(key)
    order = jax.random.permutation(for_order, len(inputs))
    c = jnp.asarray(concentration, dtype)
    share = jax.random.beta(for_share, c, c, (), dtype)

    def mixed(x: jax.Array) -> jax.Array:
        wide = x.astype(dtype)
        return (share * wide + (1 - share) * wide[order]).astype(x.dtype)

    return mixed(inputs), mixed(targets)
