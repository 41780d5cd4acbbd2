"""Wrappers on stacks of leaves and on bfloat16 parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox

LINK = ox.scale_by_lion_k(kappa="group")  # a norm per leaf: a stack must not mix them
WRAPPERS = {
    "xgrad": ox.xgrad(LINK, 0.5),
    "reset_state_every": ox.reset_state_every(LINK, 2),
    "refactorize_every": ox.refactorize_every(LINK, 2),
    "fish": ox.fish(LINK, 0.7, 2),
    "refresh": ox.refresh(LINK, 0.3, 2, noise_scale=0.0, normalize=True),
    "proxy_prox": ox.proxy_prox(LINK, 2.0, 3),
    "adaptive_eta": ox.adaptive_eta(LINK, 0.1, 0.01),
    "kalman_average_params": ox.kalman_average_params(),
}
every_wrapper = pytest.mark.parametrize("tx", WRAPPERS.values(), ids=WRAPPERS)


def value(x):
    parts = jax.tree.map(lambda p: jnp.sum(jnp.cos(p.astype(float))), x)
    return jnp.sum(jnp.stack(jax.tree.leaves(parts)))


def run(tx, dtype=jnp.float32):
    """Updates of three steps, and the last state."""
    rng = np.random.default_rng(0)
    x = {k: jnp.asarray(rng.normal(size=(2, 3)), dtype) for k in "abc"}
    x["bias"] = jnp.ones(4, dtype)
    extra = {"grad_fn": jax.grad(value), "proxy_value_fn": value, "aux_value_fn": value}
    state, outs = tx.init(x), []
    for _ in range(3):
        out, state = tx.update(jax.grad(value)(x), state, x, **extra)
        x = optax.apply_updates(x, jax.tree.map(lambda u: 0.1 * u, out))
        outs.append(out)
    return outs, state


@every_wrapper
def test_buckets_inside_change_nothing(tx):
    got, want = run(ox.bucketed(tx))[0], run(tx)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)


@every_wrapper
def test_state_of_bfloat16_parameters_is_float32_and_updates_are_bfloat16(tx):
    outs, state = run(tx, jnp.bfloat16)
    assert {u.dtype for u in jax.tree.leaves(outs)} == {jnp.dtype(jnp.bfloat16)}
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)]
    assert {x.dtype for x in floats} <= {jnp.dtype(jnp.float32)}
