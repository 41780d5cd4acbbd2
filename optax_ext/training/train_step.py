"""One training step that gives every link what it may ask for.

Links of this package need more than gradients: the loss at other parameters, the
logits, the gradient of each example. `make_train_step` builds the closures once, hands
them to ``tx.update`` under the names of the package's vocabulary, and jits the whole
with donated buffers. Under jit a closure that no link calls costs nothing.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.training.train_state import TrainState

from optax_ext._core import extra_args as vocabulary
from optax_ext._core.trees import flatten_like, is_hole

_PASSED_ALWAYS = ("value", "grad", "value_fn", "grad_fn")


class StepMetrics(NamedTuple):
    """What a step returns beside the new parameters and state.

    Attributes:
      loss: value of the loss before the step, a scalar.
      aux: second result of the loss function with ``has_aux=True``, else None. With
        per-example gradients it has a leading example axis.
    """

    loss: jax.Array
    aux: Any


def make_train_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    logits_fn: Callable[..., jax.Array] | None = None,
    has_aux: bool = False,
    per_example_grads: bool = False,
    extra_args: Mapping[str, Callable[..., Any]] | None = None,
    gradient_at: Callable[[Any, Any], Any] | None = None,
    donate: bool = True,
    jit: bool = True,
) -> Callable[..., Any]:
    r"""Build ``step``, which computes gradients and updates in one compiled call.

    The same step serves three kinds of model:

    * plain trees: ``params, opt_state, metrics = step(params, opt_state, *batch)``
    * flax.linen: ``state, metrics = step(train_state, *batch)`` with a
      `flax.training.train_state.TrainState` made with the same `tx`
    * flax.nnx: ``model, opt_state, metrics = step(model, opt_state, *batch)`` with
      ``opt_state = tx.init(nnx.state(model, nnx.Param))``; the model is updated in
      place too, variables that are no parameters (batch statistics, ...) included

    Every ``tx.update`` gets ``value``, ``grad``, ``value_fn``, ``grad_fn``, and
    ``logits_fn``, ``per_example_grads`` and others where asked. The functions accept
    trees with masked leaves (inside `optax.masked` or `optax.partition`): those take
    their present value.

    Args:
      loss_fn: ``(params, *batch) -> loss``, a scalar, or ``(loss, aux)`` with
        `has_aux`; for nnx ``(model, *batch)``.
      tx: any optax optimizer.
      logits_fn: ``(params, *batch) -> logits`` [batch, ..., classes], which
        Gauss-Newton-Bartlett needs; for nnx ``(model, *batch)``.
      has_aux: whether `loss_fn` returns an auxiliary value too.
      per_example_grads: whether to take the gradient of each example of the batch
        (leading axis of every leaf; `loss_fn` sees batches of one) and pass them as
        ``per_example_grads``. Loss and gradient are then means over examples. Memory
        grows with the batch. Not for nnx models with variables other than parameters.
      extra_args: further extra arguments by name, each a function of ``(params,
        *batch)``; for nnx ``(model, *batch)``. Functions of params (``aux_value_fn``,
        ``proxy_value_fn``) are passed on with the batch filled in, all others
        (``aux_grads``, ``hessian_diag``, ``error_mass``) are evaluated before the step.
      gradient_at: ``(opt_state, params) -> params``, where to take loss and gradient if
        not at the parameters, for example `xgrad_predict`. The update is applied to
        the parameters, and they are what the functions of params start from.
      donate: whether parameters and state give their buffers to the results; what you
        passed in cannot be used afterwards.
      jit: False returns the bare function, to put it into `jax.lax.scan` or jit it.

    Returns:
      The step. Its metrics are a `StepMetrics`.

    Raises:
      TypeError: at the first call, if the loss is not a scalar.
      ValueError: for a name in `extra_args` that no link knows.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> def loss_fn(w, x, y):
      ...     return jnp.mean((x @ w - y) ** 2)
      >>> tx = ox.lion_k(0.1)
      >>> step = ox.make_train_step(loss_fn, tx)
      >>> w = jnp.zeros(2)
      >>> w, opt_state, metrics = step(w, tx.init(w), jnp.ones((4, 2)), jnp.ones(4))
      >>> print(w, metrics.loss)
      [0.1 0.1] 1.0
    """
    further = dict(extra_args or {})
    if logits_fn is not None:
        further["logits_fn"] = logits_fn
    for name in further:
        if name not in vocabulary.NAMES or name in _PASSED_ALWAYS:
            free = [n for n in vocabulary.NAMES if n not in _PASSED_ALWAYS]
            raise ValueError(
                f"make_train_step: extra_args has {name!r}, which must be one of "
                f"{', '.join(free)}"
            )

    def value_and_aux(params, *batch):
        out = loss_fn(params, *batch)
        return out if has_aux else (out, None)

    update = functools.partial(
        _update, optax.with_extra_args_support(tx), per_example_grads, gradient_at
    )

    def on_tree(params, opt_state, *batch):
        return update(value_and_aux, further, params, opt_state, batch)

    def on_linen(state, *batch):
        params, opt_state, metrics = on_tree(state.params, state.opt_state, *batch)
        new = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
        return new, metrics

    def on_nnx(graph, params, rest, opt_state, *batch):
        # The functional form of a model: its other variables come back as aux.
        def functional(fn):
            def call(params, *batch):
                model = nnx.merge(graph, params, rest, copy=True)
                return fn(model, *batch), nnx.state(model, nnx.Not(nnx.Param))

            return call

        def model_value_and_aux(params, *batch):
            (value, aux), after = functional(value_and_aux)(params, *batch)
            return value, (aux, after)

        def of_params(fn):
            return lambda params, *batch: functional(fn)(params, *batch)[0]

        model_further = {name: of_params(fn) for name, fn in further.items()}
        params, opt_state, metrics = update(
            model_value_and_aux, model_further, params, opt_state, batch
        )
        aux, after = metrics.aux
        return params, after, opt_state, StepMetrics(metrics.loss, aux)

    if jit:
        on_tree = jax.jit(on_tree, donate_argnums=(0, 1) if donate else ())
        on_linen = jax.jit(on_linen, donate_argnums=(0,) if donate else ())
        on_nnx = jax.jit(
            on_nnx, static_argnums=0, donate_argnums=(1, 2, 3) if donate else ()
        )

    def step(carrier, *args):
        if isinstance(carrier, TrainState):
            return on_linen(carrier, *args)
        if not isinstance(carrier, nnx.Module):
            return on_tree(carrier, *args)
        graph, params, rest = nnx.split(carrier, nnx.Param, ...)
        if per_example_grads and jax.tree.leaves(rest):
            others = [".".join(map(str, p)) for p, _ in nnx.to_flat_state(rest)]
            raise ValueError(
                "make_train_step: per_example_grads=True needs an nnx model whose only "
                f"variables are parameters, got others: {', '.join(others)}"
            )
        params, rest, opt_state, metrics = on_nnx(graph, params, rest, *args)
        nnx.update(carrier, params, rest)
        return carrier, opt_state, metrics

    return step


def _update(
    tx: optax.GradientTransformationExtraArgs,
    per_example_grads: bool,
    gradient_at: Callable[[Any, Any], Any] | None,
    value_and_aux: Callable[..., tuple[jax.Array, Any]],
    further: Mapping[str, Callable[..., Any]],
    params: Any,
    opt_state: Any,
    batch: tuple[Any, ...],
) -> tuple[Any, Any, StepMetrics]:
    """Gradient, ``tx.update`` with all extra arguments, new parameters."""
    gradient = jax.value_and_grad(value_and_aux, has_aux=True)
    extra = {}
    point = params if gradient_at is None else gradient_at(opt_state, params)
    if per_example_grads:
        (values, aux), grads = jax.vmap(
            lambda *example: gradient(point, *jax.tree.map(lambda x: x[None], example))
        )(*batch)
        extra["per_example_grads"] = grads
        value = jnp.mean(values)
        grads = jax.tree.map(lambda g: jnp.mean(g, axis=0), grads)
    else:
        (value, aux), grads = gradient(point, *batch)
    extra["value"], extra["grad"] = value, grads
    extra["value_fn"] = lambda p: value_and_aux(_unmask(p, params), *batch)[0]
    extra["grad_fn"] = jax.grad(extra["value_fn"])
    for name, fn in further.items():
        if name in (*vocabulary.FUNCTIONS, *vocabulary.TREE_FUNCTIONS):
            extra[name] = lambda p, fn=fn: fn(_unmask(p, params), *batch)
        else:
            extra[name] = fn(params, *batch)
    updates, opt_state = tx.update(grads, opt_state, params, **extra)
    new_params = optax.apply_updates(params, updates)
    return new_params, opt_state, StepMetrics(value, aux)


def _unmask(tree: Any, params: Any) -> Any:
    """`tree` with the leaves that a mask hides taken from `params`."""
    leaves, (present,), treedef = flatten_like(tree, params, owner="make_train_step")
    return treedef.unflatten(
        [p if is_hole(x) else x for x, p in zip(leaves, present, strict=True)]
    )
