"""TrAct: the weight change that best takes a layer's outputs down their gradient."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam
from optax_ext._core.extra_args import require
from optax_ext._core.leaves import map_leaves
from optax_ext._core.matrices import as_matrix

_TITLE = "TrAct: Making First-layer Pre-Activations Trainable"


@catalogued(
    title=_TITLE,
    arxiv="2410.23970",
    kind="helper",
    variant="rows in Flax's order of a kernel, (height, width, channels).",
    compared="closed form: rows times the kernel's matrix are the convolution",
    example=lambda: {"images": jnp.ones((1, 4, 4, 1)), "kernel_shape": (2, 2)},
)
def im2col_inputs(
    images: jax.Array,
    kernel_shape: Sequence[int],
    strides: int | Sequence[int] = 1,
    padding: str | int | Sequence[Any] = "SAME",
    kernel_dilation: int | Sequence[int] = 1,
) -> jax.Array:
    """The rows that a convolution's kernel meets, one an image and position.

    ``im2col_inputs(x, kernel.shape, ...) @ kernel.reshape(-1, kernel.shape[-1])`` are
    the outputs of a Flax convolution without bias.

    Args:
      images: inputs [batch, *space, channels], with any number of dimensions of space.
      kernel_shape: size of the kernel in space; what follows, as in the shape of a
        whole kernel, is ignored.
      strides: step in space, one number or one a dimension.
      padding: as in Flax: "SAME", "VALID", a number, or numbers or pairs of them by
        dimension.
      kernel_dilation: distance of the kernel's points, one number or one a dimension.

    Returns:
      Rows [batch * positions, prod(kernel) * channels], in kernel order.

    Raises:
      ValueError: for images without a batch, or paddings that depend on their values
        ("CIRCULAR", "REFLECT", "CAUSAL").

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> images = jnp.arange(4.0).reshape(1, 2, 2, 1)
      >>> print(ox.im2col_inputs(images, (2, 2), padding="VALID"))
      [[0. 1. 2. 3.]]
    """
    space = images.ndim - 2
    if space < 1 or len(kernel_shape) < space:
        raise ValueError(
            f"im2col_inputs: images of shape {images.shape} and a kernel of shape "
            f"{tuple(kernel_shape)} are no [batch, *space, channels] and [*space, ...]"
        )
    if isinstance(padding, str) and padding not in ("SAME", "VALID"):
        raise ValueError(
            f"im2col_inputs: padding must be 'SAME', 'VALID', or numbers, got "
            f"{padding!r}; pad the images yourself and pass 'VALID'"
        )

    def each(value: Any) -> tuple[Any, ...]:
        return (value,) * space if isinstance(value, int) else tuple(value)

    if not isinstance(padding, str):
        padding = [(p, p) if isinstance(p, int) else tuple(p) for p in each(padding)]
    letters = "DHW"[-space:] if space <= 3 else "ABCDEFG"[:space]
    layout = f"N{letters}C", f"{letters}IO", f"N{letters}C"
    size = tuple(kernel_shape[:space])
    patches = jax.lax.conv_general_dilated_patches(
        images,
        size,
        each(strides),
        padding,
        rhs_dilation=each(kernel_dilation),
        dimension_numbers=layout,
        # Patches are copies: on an accelerator the default precision would round them.
        precision=jax.lax.Precision.HIGHEST,
    )
    channels = images.shape[-1]
    rows = patches.reshape(-1, channels, patches.shape[-1] // channels)
    return jnp.swapaxes(rows, 1, 2).reshape(len(rows), -1)


@catalogued(
    title=_TITLE,
    arxiv="2410.23970",
    kind="link",
    needs=("inputs",),
    slots=0,
    variant="the released layers' backward pass as a link; the form with the smaller "
    "matrix, of inputs or of rows.",
    compared="golden tract; a ridge regression",
)
def precondition_by_inputs(
    damping: float = 0.1,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiply a layer's gradient by the inverse second moments of its inputs.

    With X [N, n] the rows that met the kernel, and G [n, m] its gradient as a matrix:

    .. math:: \text{out} = (X^T X / N + \lambda I)^{-1} G

    It is the change of weights that, as far as damping lets it, takes a gradient step
    on the layer's outputs. It is meant for the first layer of vision models, with
    standardised inputs. Put it first in the chain. Under `jax.jit` the rows of a
    sharded batch are all rows; inside `jax.shard_map` gather them.

    Args:
      damping: lambda, above 0, in units of squared inputs (official).

    Returns:
      A link without state that needs the extra argument ``inputs``: a tree like the
      updates with X [N, fan_in] at a leaf to be treated and None, or a matrix without
      entries, at the others, which pass through. Rows are whatever met the kernel:
      examples, positions (`im2col_inputs`), time steps.

    Raises:
      ValueError: for a damping of 0 or less; in `update` without ``inputs``, or for
        rows that do not fit the leaf.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> tx = ox.precondition_by_inputs(damping=1.0)
      >>> x = jnp.array([[3.0, 0.0], [0.0, 1.0]])
      >>> g = {"kernel": jnp.array([[5.5], [1.5]]), "bias": jnp.ones(1)}
      >>> inputs = {"kernel": x, "bias": None}
      >>> out, _ = tx.update(g, tx.init(g), inputs=inputs)
      >>> print(out["kernel"].T.round(3), out["bias"])
      [[1. 1.]] [1.]
    """
    owner = "precondition_by_inputs"
    check_hyperparam(owner, low=0.0, open_low=True, damping=damping)

    def rule(g, slots, x):
        if x is None or x.size == 0:
            return g, slots
        if g.ndim < 2 or x.ndim != 2 or x.shape[1] != as_matrix(g).shape[0]:
            raise ValueError(f"inputs {x.shape} are no rows [N, fan_in] of {g.shape}")
        rows, fan_in = x.shape
        grads = as_matrix(g)
        if rows >= fan_in:
            moments = x.T @ x / rows + damping * jnp.eye(fan_in, dtype=x.dtype)
            out = _solve(moments, grads)
        else:
            gram = x @ x.T + rows * damping * jnp.eye(rows, dtype=x.dtype)
            out = (grads - x.T @ _solve(gram, x @ grads)) / damping
        return out.reshape(g.shape), slots

    def update(updates, state, params=None, **extra):
        del params
        inputs = require(owner, extra, "inputs")
        out, _ = map_leaves(rule, updates, (), (inputs,), owner=owner)
        return out, state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _solve(positive: jax.Array, right: jax.Array) -> jax.Array:
    return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(positive), right)
