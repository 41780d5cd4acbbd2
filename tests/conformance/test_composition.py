"""Inside optax's combinators."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tests.conformance.methods import (
    Method,
    Run,
    about,
    assert_close,
    assert_equal,
    each,
    standard_run,
)
from tests.conformance.problem import Inputs, Objective, recorded

VISIBLE = {
    "conv": {"kernel": True},
    "dense": {"kernel": False, "bias": True},
    "head": {"kernel": True},
    "scale": False,
}
HIDDEN = jax.tree.map(lambda keep: not keep, VISIBLE)
STEPS = 2


def only(mask: Any, tree: Any) -> Any:
    """The tree with None where the mask is False."""
    return jax.tree.map(lambda keep, x: x if keep else None, mask, tree)


@dataclasses.dataclass(frozen=True)
class Pinned(Objective):
    """An objective whose functions fill holes with given parameters."""

    of: Callable[[Any], dict[str, Any]]
    present: Any

    def functions(self, params: Any) -> dict[str, Any]:
        del params
        return self.of(self.present)


@functools.cache
def run_on_visible_leaves(method: Method) -> Run:
    """The method on a tree that holds the visible leaves and nothing else."""
    problem, (inputs, *_) = recorded()
    structure = jax.tree.structure(inputs.params)

    def narrow(tree):
        return only(VISIBLE, tree) if jax.tree.structure(tree) == structure else tree

    arrays = {name: narrow(tree) for name, tree in inputs.arrays.items()}
    seen = Inputs(narrow(inputs.params), arrays)
    pinned = Pinned(problem.value, problem.functions, inputs.params)
    return Run(method.make(), pinned, method.needs, jit=None).over([seen] * STEPS)


@each()
def test_masked_leaves_pass_and_the_others_see_only_each_other(method):
    problem, (inputs, *_) = recorded()
    masked = optax.masked(method.make(), VISIBLE)
    with about(method, f"optax.masked with {VISIBLE}"):
        run = Run(masked, problem, method.needs, jit=None).over([inputs] * STEPS)
        want = run_on_visible_leaves(method)
        for got, alone in zip(run.updates, want.updates, strict=True):
            assert_equal(only(HIDDEN, got), only(HIDDEN, inputs.grads))
            assert_close(only(VISIBLE, got), alone, rtol=1e-5)


@each()
def test_partition_leaves_other_labels_alone(method):
    method = method.lightened()
    problem, (inputs, *_) = recorded()
    labels = jax.tree.map(lambda keep: "train" if keep else "freeze", VISIBLE)
    rules: dict[Any, Any] = {"train": method.make(), "freeze": optax.set_to_zero()}
    with about(method, f"optax.partition with {labels}"):
        tx = optax.partition(rules, labels)
        run = Run(tx, problem, method.needs, jit=None).over([inputs] * STEPS)
        want = run_on_visible_leaves(method)
        for got, alone in zip(run.updates, want.updates, strict=True):
            assert not any(x.any() for x in jax.tree.leaves(only(HIDDEN, got)))
            assert_close(only(VISIBLE, got), alone, rtol=1e-5)


@each()
def test_multi_steps_takes_one_step_of_the_mean_gradient(method):
    method = method.lightened()
    problem, inputs = recorded()
    accumulated = optax.MultiSteps(method.make(), every_k_schedule=2)
    update: Any = accumulated.update
    tx = optax.GradientTransformationExtraArgs(accumulated.init, update)
    first, second, _ = inputs
    mean = jax.tree.map(lambda a, b: a + (b - a) / 2, first.grads, second.grads)
    both = second._replace(arrays={**second.arrays, "grad": mean})
    with about(method, "optax.MultiSteps, every second step"):
        # optax divides floats by integers here, which strict promotion forbids.
        with jax.numpy_dtype_promotion("standard"):
            run = Run(tx, problem, method.needs).over([first, second, first, second])
        start = method.make().init(first.params)
        want = standard_run(method).afresh().over([both, both], start)
        for step in (0, 2):
            assert not any(x.any() for x in jax.tree.leaves(run.updates[step]))
        assert_close([run.updates[1], run.updates[3]], want.updates, rtol=1e-5)


@each()
def test_apply_if_finite_leaves_no_trace_of_a_nan(method):
    method = method.lightened()
    problem, inputs = recorded()
    nan = jax.tree.map(lambda g: jnp.full_like(g, jnp.nan), inputs[0].grads)
    broken = inputs[1]._replace(arrays={**inputs[1].arrays, "grad": nan})
    guarded = optax.apply_if_finite(method.make(), max_consecutive_errors=5)
    with about(method, "optax.apply_if_finite, NaN gradients at the second of 3 steps"):
        run = Run(guarded, problem, method.needs).over([inputs[0], broken, inputs[1]])
        before, after, _ = (state.inner_state for state in run.states)
        assert_equal(after, before)
        assert not any(x.any() for x in jax.tree.leaves(run.updates[1]))
        plain = standard_run(method)
        assert_close(run.updates[2], plain.updates[1], rtol=1e-5)
