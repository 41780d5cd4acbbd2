"""Parameters as matrices: which axes are inputs, outputs, heads and layers.

A matrix rule (orthogonalisation, Kronecker factors, subspaces) is as good as the
matrices that it is shown. A shape does not say what they are: a kernel [512, 8, 64] is
a projection onto eight heads, [512, 512] matrices of eight stacked layers, or a
convolution. `matrix_axes` reads it from the names that Flax gives, `as_matrices` shows
a link the matrices, and gives all other leaves to another link.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from optax_ext._core.checks import check_interval
from optax_ext._core.trees import Bucket, flatten_like, is_hole, is_unit
from optax_ext._core.views import full_precision, viewed


def matrix_axes(
    params: Any = None,
    *,
    exclude: Sequence[str] = ("embed", "bias"),
    heads: Sequence[str] = (r"\b(query|key|value|qkv)\b",),
    scanned: Sequence[str] = (),
) -> Any:
    r"""Which axes of each parameter are the inputs and outputs of a matrix.

    All axes but the last are inputs, so that a kernel [in, out] is itself and a
    convolution [kh, kw, in, out] is [kh * kw * in, out]; the exceptions go by path, as
    in `label_by_path`.

    Args:
      params: parameters, arrays or shapes; None returns the function of params.
      exclude: regular expressions of paths that are no matrices whatever their rank:
        embeddings, whose rows are looked up one by one, and the biases of attention.
      heads: those whose last two axes, [heads, features], are both outputs: Flax's
        attention projections [in, heads, features]. Its output projection
        [heads, features, out] follows the general rule.
      scanned: those whose first axis counts layers, as `flax.linen.scan` stacks them:
        one matrix a layer.

    Returns:
      A tree like `params` with an `optax.contrib.MuonDimensionNumbers` at each matrix
      and None elsewhere (`optax.contrib.muon` takes it too), or the function of params
      that makes it.

    Raises:
      ValueError: for an expression that does not compile.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> params = {"query": {"kernel": jnp.ones((6, 2, 3)), "bias": jnp.ones((2, 3))}}
      >>> ox.matrix_axes(params)["query"]["kernel"]
      MuonDimensionNumbers(reduction_axis=(0,), output_axis=(1, 2))
    """
    rules = {"exclude": exclude, "heads": heads, "scanned": scanned}
    compiled = {name: _compile(name, rule) for name, rule in rules.items()}

    def of_leaf(path, leaf):
        where = jax.tree_util.keystr(path)
        is_a = {k: any(r.search(where) for r in v) for k, v in compiled.items()}
        if is_hole(leaf) or is_a["exclude"]:
            return None
        rank = leaf.stack.ndim - 1 if isinstance(leaf, Bucket) else leaf.ndim
        first = 1 if is_a["scanned"] else 0
        if rank - first < 2:
            return None
        outputs = 2 if is_a["heads"] and rank - first > 2 else 1
        return MuonDimensionNumbers(
            tuple(range(first, rank - outputs)), tuple(range(rank - outputs, rank))
        )

    def axes(params):
        return jax.tree_util.tree_map_with_path(of_leaf, params, is_leaf=is_unit)

    return axes if params is None else axes(params)


def as_matrices(
    inner: optax.GradientTransformation,
    fallback: optax.GradientTransformation | None = None,
    dimension_numbers: Any = matrix_axes,
    block_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Show `inner` the matrices among the parameters, and `fallback` the rest.

    A leaf with batch axes (stacked layers) or cut into blocks is a stack of matrices,
    over which the rules of this package are mapped; every other matrix is a leaf of
    rank 2. Inside, ``bucketed(inner)`` stacks matrices of equal shape, which is what
    keeps many layers cheap to compile.

    Args:
      inner: a link of this package, or one that acts entry by entry.
      fallback: the link for all other leaves; None is `optax.scale_by_adam` with its
        defaults, in float32.
      dimension_numbers: tree like the parameters of
        `optax.contrib.MuonDimensionNumbers`, None where a leaf is no matrix; or a
        function of params that returns one. Axes in neither of the two lists are
        batch axes. The default reads the names that Flax gives.
      block_size: largest side of a matrix; longer sides are cut into equal blocks,
        with zeros at the end where they do not divide. None does not cut.

    Returns:
      A link that takes the extra arguments of both. Its state is that of
      `optax.partition`.

    Raises:
      ValueError: at construction for a block size below 1; at init for axes that do not
        fit a leaf, and for an extra argument that is not shaped like its leaf.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> tx = ox.as_matrices(ox.bucketed(ox.scale_by_lion_k()))
      >>> params = {"conv": {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(4)}}
      >>> state = tx.init(params)
      >>> state.inner_states["matrix"].inner_state.mu["float32[18, 4]#0"].stack.shape
      (1, 18, 4)
    """
    if block_size is not None:
        check_interval("as_matrices", block_size=block_size)
    if fallback is None:
        fallback = full_precision(optax.scale_by_adam())

    def axes_of(tree):
        axes = dimension_numbers
        axes = axes(tree) if callable(axes) else axes
        return jax.tree.leaves(
            axes, is_leaf=lambda x: x is None or isinstance(x, MuonDimensionNumbers)
        )

    def labels(tree):
        leaves, _, treedef = flatten_like(tree)
        axes = axes_of(tree)
        if len(axes) != len(leaves):
            raise ValueError(
                f"as_matrices: dimension_numbers has {len(axes)} leaves, the "
                f"parameters have {len(leaves)}"
            )
        return treedef.unflatten(["rest" if a is None else "matrix" for a in axes])

    def view_of(tree):
        return _Matrices(tree, axes_of(tree), block_size)

    return optax.with_extra_args_support(
        optax.partition({"matrix": viewed(inner, view_of), "rest": fallback}, labels)
    )


def _compile(name: str, rules: Sequence[str]) -> list[re.Pattern[str]]:
    try:
        return [re.compile(r) for r in ([rules] if isinstance(rules, str) else rules)]
    except (re.error, TypeError) as error:
        raise ValueError(
            f"matrix_axes: {name}={rules!r} holds no regular expressions: {error}"
        ) from error


class _Fold:
    """One leaf as a stack of matrices [n, rows, columns], and back."""

    def __init__(self, shape: tuple[int, ...], axes: Any, block: int | None):
        rank = len(shape)
        given = [(a,) if isinstance(a, int) else tuple(a) for a in axes]
        inputs, outputs = ([a % rank for a in side] for side in given)
        used = [*inputs, *outputs]
        if len(set(used)) < len(used) or any(
            not -rank <= a < rank for a in sum(given, ())
        ):
            raise ValueError(f"as_matrices: {axes} are no axes of an array of {shape}")
        batch = [a for a in range(rank) if a not in used]
        self.shape, self.order = shape, [*batch, *inputs, *outputs]
        sides = (batch, inputs, outputs)
        self.flat = tuple(math.prod(shape[a] for a in side) for side in sides)
        self.blocks = [
            1 if block is None else -(-n // block) or 1 for n in self.flat[1:]
        ]
        sizes = zip(self.flat[1:], self.blocks, strict=True)
        self.block = tuple(-(-n // blocks) for n, blocks in sizes)

    def to(self, x: jax.Array) -> jax.Array:
        (n, rows, columns), (i, j), (r, c) = self.flat, self.blocks, self.block
        x = x.transpose(self.order).reshape(self.flat)
        x = jnp.pad(x, ((0, 0), (0, i * r - rows), (0, j * c - columns)))
        return x.reshape(n, i, r, j, c).swapaxes(2, 3).reshape(n * i * j, r, c)

    def back(self, x: jax.Array) -> jax.Array:
        (n, rows, columns), (i, j), (r, c) = self.flat, self.blocks, self.block
        x = x.reshape(n, i, j, r, c).swapaxes(2, 3).reshape(n, i * r, j * c)
        x = x[:, :rows, :columns].reshape([self.shape[a] for a in self.order])
        return x.transpose([self.order.index(a) for a in range(len(self.order))])

    @property
    def is_single(self) -> bool:
        return self.flat[0] * self.blocks[0] * self.blocks[1] == 1


class _Matrices:
    """The view of a tree in which every leaf that is not a hole is a matrix."""

    def __init__(self, like: Any, axes: Sequence[Any], block: int | None):
        self._like = like
        leaves, _, self._treedef = flatten_like(like)
        if any(isinstance(leaf, Bucket) for leaf in leaves):
            raise ValueError(
                "as_matrices: the leaves are in buckets already; "
                "write as_matrices(bucketed(inner))"
            )
        self._folds = [
            None if is_hole(leaf) else _Fold(leaf.shape, axis, block)
            for leaf, axis in zip(leaves, axes, strict=True)
        ]

    def to(self, tree: Any) -> Any:
        leaves = flatten_like(self._like, tree, owner="as_matrices")[1][0]
        pairs = zip(self._folds, leaves, strict=True)
        return self._treedef.unflatten([self._to(fold, leaf) for fold, leaf in pairs])

    def _to(self, fold: _Fold | None, leaf: Any) -> Any:
        if fold is None or is_hole(leaf):
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.eval_shape(lambda x: self._to(fold, x), leaf)
        if leaf.shape == fold.shape:
            stack = fold.to(leaf)
        elif leaf.shape[1:] == fold.shape:  # gradients of examples
            stack = jax.vmap(fold.to, out_axes=1)(leaf)
        else:
            raise ValueError(
                f"as_matrices: an extra argument has shape {leaf.shape} where the "
                f"parameter has {fold.shape}"
            )
        return stack[0] if fold.is_single else Bucket(stack)

    def back(self, tree: Any) -> Any:
        leaves = flatten_like(self._like, tree, owner="as_matrices")[1][0]
        pairs = zip(self._folds, leaves, strict=True)
        return self._treedef.unflatten([self._back(f, leaf) for f, leaf in pairs])

    @staticmethod
    def _back(fold: _Fold | None, leaf: Any) -> Any:
        if fold is None or is_hole(leaf):
            return leaf
        return fold.back(leaf.stack if isinstance(leaf, Bucket) else leaf[None])
