"""What the conformance tests optimise, and what it can tell a method.

`Softmax` is a softmax regression on any tree: every entry of every leaf is one of its
coefficients. With it come all extra arguments of the package's vocabulary that make
sense for any tree. `record` runs it for a few steps of plain gradient descent; most
tests feed what it recorded, so that differences in rounding do not grow.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

BATCH, CLASSES, STEPS = 5, 3, 3
SHAPES = {
    "conv": {"kernel": (2, 2, 1, 3)},
    "dense": {"kernel": (4, 3), "bias": (3,)},
    "head": {"kernel": (4, 3)},
    "scale": (),
}
"""Ranks 4, 2, 1 and 0, and two equal shapes, which `bucketed` stacks."""


def tree_like(shapes: Any, dtype: Any = jnp.float32, seed: int = 0) -> Any:
    """A tree of normal numbers of the given shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), dtype),
        shapes,
        is_leaf=lambda x: type(x) is tuple,
    )


def is_hole(leaf: Any) -> bool:
    """Whether a leaf is None or hidden by `optax.masked`."""
    return leaf is None or isinstance(leaf, optax.MaskedNode)


def fill(tree: Any, present: Any) -> Any:
    """`tree` with its holes taken from `present`, as `make_train_step` does it."""
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_hole)
    others = treedef.flatten_up_to(present)
    return treedef.unflatten(
        [p if is_hole(x) else x for x, p in zip(leaves, others, strict=True)]
    )


def _basis(leaf: jax.Array) -> jax.Array | None:
    """One direction in the space of a kernel's inputs; None for other leaves."""
    if leaf.ndim < 2:
        return None
    fan_in = leaf.size // leaf.shape[-1] if leaf.size else 0
    return jnp.full((fan_in, 1), max(fan_in, 1) ** -0.5, leaf.dtype)


def _layer_inputs(leaf: jax.Array) -> jax.Array:
    """Rows that a kernel met; no rows for other leaves (a bare None were no tree)."""
    if leaf.ndim < 2:
        return jnp.zeros((0, 0), leaf.dtype)
    fan_in = leaf.size // leaf.shape[-1] if leaf.size else 0
    rows = np.random.default_rng(3).normal(size=(BATCH, fan_in))
    return jnp.asarray(rows, leaf.dtype)


@dataclasses.dataclass(frozen=True)
class Objective:
    """A function of parameters; `extra` makes extra arguments of it."""

    value: Callable[[Any], jax.Array]

    def functions(self, params: Any) -> dict[str, Callable[..., Any]]:
        """Functions of params that accept trees with holes."""

        def value_fn(p):
            return self.value(fill(p, params))

        return {
            "value_fn": value_fn,
            "grad_fn": jax.grad(value_fn),
            "aux_value_fn": lambda p: -value_fn(p),
            "proxy_value_fn": lambda p: value_fn(p) / 2,
        }

    def arrays(self, params: Any) -> dict[str, Any]:
        """The value, and trees like params."""
        value, grad = jax.value_and_grad(self.value)(params)
        # +-1 in turn: Rademacher numbers that are the same at every step.
        vector = jax.tree.map(
            lambda p: (1 - 2 * (jnp.arange(p.size) % 2)).reshape(p.shape), params
        )
        vector = jax.tree.map(lambda v, p: v.astype(p.dtype), vector, params)
        hvp = jax.jvp(jax.grad(self.value), (params,), (vector,))[1]
        return {
            "value": value,
            "grad": grad,
            "vector": vector,
            "hvp": hvp,
            # Positive, so that dividing by it is tame.
            "hessian_diag": jax.tree.map(
                lambda v, h: jnp.abs(v * h) + jnp.asarray(0.1, h.dtype), vector, hvp
            ),
            # As if from two examples.
            "per_example_grads": jax.tree.map(
                lambda g: jnp.stack([g / 2, g + g / 2]), grad
            ),
            "grad_sq_mean": jax.tree.map(lambda g: g**2 + g**2 / 4, grad),
            # With a basis, one direction could never move.
            "bases": jax.tree.map(lambda p: None, params),
            "inputs": jax.tree.map(_layer_inputs, params),
            # By name of layer, which a tree of any kind does not have.
            "activations": {},
            "aux_grads": jax.tree.map(lambda g: g[::-1] if g.ndim else -g, grad),
            "error_mass": jnp.tanh(value),
        }


class Softmax(Objective):
    """Softmax regression on all parameters of a tree."""

    def __init__(self, params: Any, seed: int = 1):
        rng = np.random.default_rng(seed)
        self.features = jax.tree.map(
            lambda p: rng.normal(size=(BATCH, CLASSES, *p.shape)), params
        )
        self.labels = rng.integers(CLASSES, size=BATCH)
        super().__init__(lambda p: self.loss_of(self.logits(p)))

    def logits(self, params: Any) -> jax.Array:
        """Logits [batch, classes], in float32 or wider."""
        leaves, treedef = jax.tree.flatten(params)
        is_double = any(p.dtype == jnp.float64 for p in leaves)
        wide = jnp.float64 if is_double else jnp.float32
        total = jnp.zeros((BATCH, CLASSES), wide)
        for p, x in zip(leaves, treedef.flatten_up_to(self.features), strict=True):
            total += jnp.tensordot(jnp.asarray(x, wide), p.astype(wide), p.ndim)
        return total

    def losses(self, logits: jax.Array) -> jax.Array:
        """Cross-entropies [batch]."""
        return optax.losses.softmax_cross_entropy_with_integer_labels(
            logits, self.labels
        )

    def loss_of(self, logits: jax.Array) -> jax.Array:
        """The mean cross-entropy."""
        return jnp.mean(self.losses(logits))

    def functions(self, params: Any) -> dict[str, Callable[..., Any]]:
        def logits_fn(p):
            return self.logits(fill(p, params))

        return {**super().functions(params), "logits_fn": logits_fn}

    def arrays(self, params: Any) -> dict[str, Any]:
        each = jax.vmap(
            lambda row: jax.grad(lambda p: self.losses(self.logits(p))[row])(params)
        )(jnp.arange(BATCH))
        squares = jax.tree.map(lambda g: jnp.mean(g**2, axis=0), each)
        return {
            **super().arrays(params),
            "per_example_grads": each,
            "bases": jax.tree.map(_basis, params),
            "grad_sq_mean": squares,
            "sampled_labels": jnp.asarray((self.labels + 1) % CLASSES),
            "logits_grad": jax.grad(self.loss_of)(self.logits(params)),
        }


class Inputs(NamedTuple):
    """What a method is given at one step."""

    params: Any
    arrays: dict[str, Any]

    @property
    def grads(self) -> Any:
        return self.arrays["grad"]


def record(params: Any, steps: int = STEPS) -> tuple[Softmax, list[Inputs]]:
    """A softmax problem on a tree, and its inputs under plain gradient descent."""
    problem = Softmax(params)
    arrays = jax.jit(problem.arrays)
    inputs = []
    for _ in range(steps):
        inputs.append(Inputs(params, arrays(params)))
        params = jax.tree.map(
            lambda p, g: p - jnp.asarray(0.3, p.dtype) * g, params, inputs[-1].grads
        )
    return problem, inputs


@functools.cache
def recorded(dtype: str = "float32") -> tuple[Softmax, list[Inputs]]:
    """`record` for the standard tree."""
    return record(tree_like(SHAPES, dtype))


def extra(problem: Objective, inputs: Inputs, needs: Iterable[str]) -> dict[str, Any]:
    """The extra arguments that a method names in its entry of the catalogue.

    Raises:
      NotImplementedError: for a name that the problem cannot serve.
    """
    known = {**inputs.arrays, **problem.functions(inputs.params)}
    wanted = [name for name in needs if name != "params"]
    for name in wanted:
        if name not in known:
            raise NotImplementedError(
                f"no extra argument {name!r} here: add it to tests/conformance/problem"
            )
    return {name: known[name] for name in wanted}
