"""Every method on a mesh of 8 CPU devices against one device; prints JSON.

A process of its own, because the number of devices is fixed when jax starts:
``XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m <this module>``.
"""

import json
import traceback

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.conformance.methods import (
    ALL_KINDS,
    Method,
    Run,
    assert_close,
    methods,
)
from tests.conformance.problem import record, tree_like

SPECS = {
    "conv": ((2, 2, 8, 3), PartitionSpec(None, None, "devices")),
    "kernel": ((8, 16), PartitionSpec(None, "devices")),
    "bias": ((24,), PartitionSpec("devices")),
    "scale": ((), PartitionSpec()),
}

SOLVES = {"gradient_regularized_newton": 1e-4}
"""Methods that solve linear systems, which multiplies rounding by their condition."""


def main() -> None:
    """Check all methods, and print what failed by method."""
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    params = tree_like({name: shape for name, (shape, _) in SPECS.items()})
    params = jax.tree.map(lambda p: p / 16, params)  # so that softmax is not saturated
    problem, alone = record(params)
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))
    placed = {n: NamedSharding(mesh, spec) for n, (_, spec) in SPECS.items()}

    def place(tree):
        like_params = isinstance(tree, dict) and all(
            n in tree and jnp.shape(tree[n]) == params[n].shape for n in params
        )
        everywhere = NamedSharding(mesh, PartitionSpec())
        return jax.device_put(tree, placed if like_params else everywhere)

    sharded = [
        x._replace(
            params=place(x.params), arrays={k: place(v) for k, v in x.arrays.items()}
        )
        for x in alone
    ]
    failures = {}
    for method in methods(*ALL_KINDS):
        try:
            check(method.lightened(), problem, alone, sharded)
        except Exception:
            failures[method.name] = traceback.format_exc(limit=-2)
    print(json.dumps({"devices": len(jax.devices()), "failures": failures}))


def check(method: Method, problem, alone, sharded) -> None:
    """The state takes the parameters' sharding, the updates are those of one device."""
    one = Run(method.make(), problem, method.needs).over(alone)
    many = Run(method.make(), problem, method.needs)
    shardings = {x.shape: x.sharding for x in sharded[0].params.values()}
    many.over(sharded)
    states = {"init": many.tx.init(sharded[0].params), "last": many.states[-1]}
    for path, leaf in jax.tree_util.tree_leaves_with_path(states):
        want = shardings.get(leaf.shape) if leaf.ndim else None
        if want is not None and not leaf.sharding.is_equivalent_to(want, leaf.ndim):
            where = jax.tree_util.keystr(path)
            raise AssertionError(f"state{where} has sharding {leaf.sharding}")
    # Sums over devices are in another order: some tens of roundings of float32.
    got, want = (
        jax.tree.map(lambda *steps: np.stack(steps), *run.updates)
        for run in (many, one)
    )
    assert_close(got, want, rtol=SOLVES.get(method.name, 1e-5))


if __name__ == "__main__":
    main()
