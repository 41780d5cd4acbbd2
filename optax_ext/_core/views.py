"""Links that see the parameters in another form: stacked, cast, ...

`viewed` translates everything that enters an inner link (updates, params, extra trees,
functions of params) and translates what it emits back.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from optax_ext._core import extra_args as names
from optax_ext._core.trees import computing_dtype, is_hole, naming


class View(Protocol):
    """A pair of maps between trees like params and what the inner link sees.

    Dtypes need not survive the way back: `viewed` restores them.
    """

    def to(self, tree: Any) -> Any:
        """Tree like params -> what the inner link sees."""
        ...

    def back(self, tree: Any) -> Any:
        """What the inner link sees -> tree like params."""
        ...


def viewed(
    inner: optax.GradientTransformation, view_of: Callable[[Any], View]
) -> optax.GradientTransformationExtraArgs:
    """Run `inner` on another view of the parameters.

    Args:
      inner: the link to run.
      view_of: tree like params -> its `View`; called on params, or on the updates where
        `update` gets no params.

    Returns:
      A link with the state of `inner` on the view.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params):
        return inner.init(view_of(params).to(params))

    def update(updates, state, params=None, **extra):
        like = updates if params is None else params
        view = view_of(like)
        seen = {name: _translate(view, like, name, x) for name, x in extra.items()}
        out, state = inner.update(
            view.to(updates),
            state,
            None if params is None else view.to(params),
            **seen,
        )
        return _cast_like(view.back(out), updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _translate(view: View, like: Any, name: str, value: Any) -> Any:
    """An extra argument as the inner link must see it."""
    if value is None:
        return None
    if name in names.TREES:
        return view.to(value)
    if name in names.MATRIX_TREES:
        # A view has no place for None; a matrix without entries says the same.
        empty = jnp.zeros((0, 0), jnp.float32)
        return view.to(
            jax.tree.map(lambda m: empty if m is None else m, value, is_leaf=is_hole)
        )
    if name in names.FUNCTIONS:
        return lambda seen: value(_cast_like(view.back(seen), like))
    if name in names.TREE_FUNCTIONS:
        return lambda seen: view.to(value(_cast_like(view.back(seen), like)))
    return value


def _cast_like(tree: Any, like: Any) -> Any:
    return jax.tree.map(
        lambda leaf, x: x if is_hole(leaf) else x.astype(leaf.dtype),
        like,
        tree,
        is_leaf=is_hole,
    )


class _Float32:
    """The view in which every leaf is float32 or wider."""

    @staticmethod
    def to(tree: Any) -> Any:
        def cast(path, x):
            with naming("full_precision", lambda: path):
                dtype = computing_dtype(x)
            if isinstance(x, jax.ShapeDtypeStruct):
                return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)
            return x.astype(dtype)

        return jax.tree_util.tree_map_with_path(cast, tree)

    @staticmethod
    def back(tree: Any) -> Any:
        return tree


def full_precision(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    r"""Run any optax link or optimizer in float32, whatever the leaves' dtype.

    Leaves narrower than float32 are cast to it on the way in, and what comes out is
    cast to the gradient's dtype: the moments of bfloat16 parameters are float32, the
    hyper-parameters are never rounded to bfloat16, and a chain inside rounds once, at
    its end. The inner link runs under jax's standard dtype promotion, so that optax's
    own optimizers also work where the program around them is strict.

    It makes up for three things that optax 0.2.8 does with bfloat16 parameters: second
    moments stall at half their value, scheduled learning rates are rounded to three
    digits, and most of its optimizers raise under strict promotion.

    Args:
      inner: any link, wrapper or finished optimizer.

    Returns:
      The same in float32 (float64 for float64 leaves). Its state is the inner state of
      float32 parameters.

    Example:
      >>> import jax.numpy as jnp, optax, optax_ext as ox
      >>> tx = ox.full_precision(optax.adamw(1e-3))
      >>> params = {"w": jnp.ones((2,), jnp.bfloat16)}
      >>> optax.tree.get(tx.init(params), "nu")["w"].dtype
      dtype('float32')
    """
    return _standard_promotion(viewed(inner, lambda params: _Float32))


def _standard_promotion(
    inner: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Run `inner` where integers and floats mix, as optax's counts and schedules do."""

    def init(params):
        with jax.numpy_dtype_promotion("standard"):
            return inner.init(params)

    def update(updates, state, params=None, **extra):
        with jax.numpy_dtype_promotion("standard"):
            return inner.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def inject_hyperparams(
    inner_factory: Callable[..., optax.GradientTransformation],
    static_args: str | Iterable[str] = (),
    hyperparam_dtype: Any = jnp.float32,
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """`optax.inject_hyperparams`, with hyper-parameters kept in float32.

    optax casts hyper-parameters to the dtype of the parameters unless told otherwise.
    In bfloat16 that rounds b2 = 0.999 to 1, and Adam's first step divides zero by zero.
    It also takes every integer for a hyper-parameter and every function for a schedule;
    here, arguments that are annotated, and not as floats, stay what they are
    (``update_interval``, ``mask``, ``kappa``, ...).

    Args:
      inner_factory: as in optax. The moments of optax's own optimizers follow the
        parameters: give them as `full_precision` of the optimizer.
      static_args: further arguments to leave alone, as in optax.
      hyperparam_dtype: dtype of numeric hyper-parameters in the state.

    Returns:
      As in optax.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> tx = ox.inject_hyperparams(ox.lion_k)(learning_rate=1e-3)
      >>> state = tx.init({"w": jnp.ones((2,), jnp.bfloat16)})
      >>> state.hyperparams["learning_rate"].dtype
      dtype('float32')
    """
    static = {static_args} if isinstance(static_args, str) else set(static_args)
    for name, parameter in inspect.signature(inner_factory).parameters.items():
        annotation = parameter.annotation
        free = annotation in (parameter.empty, jax.Array, "jax.Array")
        if not free and not any(w in str(annotation) for w in ("float", "Scalar")):
            static.add(name)
    factory = optax.inject_hyperparams(inner_factory, static, hyperparam_dtype)

    @functools.wraps(inner_factory)
    def make(*args, **kwargs):
        return _standard_promotion(factory(*args, **kwargs))

    return make
