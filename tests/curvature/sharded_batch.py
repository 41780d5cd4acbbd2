"""Estimates and products on a batch over 8 devices against one device.

A process of its own, because the number of devices is fixed when jax starts.
"""

# Trees of arrays, which the types of optax leave open.
# pyright: reportArgumentType=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_ext as ox

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(32, 5)), jnp.float32)
LABELS = jnp.asarray(RNG.integers(3, size=32))
PARAMS = {
    "in": jnp.asarray(RNG.normal(size=(5, 8)), jnp.float32),
    "out": jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32),
}
ESTIMATORS = (
    ox.hutchinson_diag(num_samples=2),
    ox.gauss_newton_bartlett_diag(),
    ox.empirical_fisher_diag(),
)


@jax.jit
def curvature(params, x, labels):
    """All estimates and products, of one batch."""

    def logits_fn(p):
        return jnp.tanh(x @ p["in"]) @ p["out"]

    def losses(p):
        return optax.losses.softmax_cross_entropy_with_integer_labels(
            logits_fn(p), labels
        )

    def loss(logits):
        return jnp.mean(
            optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        )

    def value_fn(p):
        return loss(logits_fn(p))

    extra = {
        "value_fn": value_fn,
        "logits_fn": logits_fn,
        "sampled_labels": labels,
        "per_example_grads": jax.jacobian(losses)(params),
    }
    estimates = [e.update(None, e.init(params), params, **extra)[0] for e in ESTIMATORS]
    products = [
        ox.hvp(value_fn)(params, params),
        ox.gnvp(logits_fn, loss)(params, params),
        ox.finite_difference_hvp(jax.grad(value_fn))(params, params),
    ]
    return estimates, products


def main() -> None:
    """Compare, and say so."""
    assert len(jax.devices()) == 8
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("batch"))
    columns = NamedSharding(mesh, PartitionSpec(None, "batch"))
    alone = curvature(PARAMS, X, LABELS)
    params = {**PARAMS, "in": jax.device_put(PARAMS["in"], columns)}
    spread = curvature(params, *jax.device_put((X, LABELS), rows))
    for got, want in zip(jax.tree.leaves(spread), jax.tree.leaves(alone), strict=True):
        # Sums in another order; differences over 0.01 magnify their rounding.
        largest = float(jnp.abs(want).max())
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * largest)
    print("equal")


if __name__ == "__main__":
    main()
