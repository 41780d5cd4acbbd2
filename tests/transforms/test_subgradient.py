"""Geometric subgradients."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox


def gradients(steps):
    rng = np.random.default_rng(0)
    shapes = {"bias": (3,), "dense": (4, 3)}
    return [
        {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
        for _ in range(steps)
    ]


def run(tx, gs, **extra):
    state, out = tx.init(gs[0]), []
    for g in gs:
        u, state = tx.update(g, state, **extra)
        out.append(u)
    return out, state


def norm(tree):
    return float(optax.tree.norm(tree))


def test_the_length_of_step_t_is_decay_to_the_t():
    out, state = run(ox.scale_by_geometric_subgradient(decay=0.7), gradients(5))
    np.testing.assert_allclose([norm(u) for u in out], 0.7 ** np.arange(5), rtol=1e-6)
    assert isinstance(state, ox.GeometricSubgradientState)
    assert int(state.count) == 5


def test_the_direction_is_that_of_the_gradient_of_the_whole_tree():
    (g,) = gradients(1)
    (u,), _ = run(ox.scale_by_geometric_subgradient(), [g])
    size = norm(g)
    jax.tree.map(lambda u, g: np.testing.assert_allclose(u, g / size, 1e-6), u, g)


def test_the_path_is_shorter_than_the_geometric_series():
    gs = [{"x": jnp.ones(2)}] * 200
    out, _ = run(ox.scale_by_geometric_subgradient(decay=0.9), gs)
    total = sum(norm(u) for u in out)
    assert 9.999 < total <= 10 * (1 + 1e-6)


def test_a_zero_gradient_gives_zero_and_counts():
    gs = gradients(2)
    gs[0] = jax.tree.map(jnp.zeros_like, gs[0])
    out, _ = run(ox.scale_by_geometric_subgradient(decay=0.5), gs)
    assert norm(out[0]) == 0
    np.testing.assert_allclose(norm(out[1]), 0.5, rtol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_extreme_gradients_give_steps_of_the_same_length(size):
    (u,), _ = run(ox.scale_by_geometric_subgradient(), [{"x": jnp.full(4, size)}])
    np.testing.assert_allclose(u["x"], np.full(4, 0.5), rtol=1e-6)


def test_a_subgradient_norm_of_another_point_takes_the_place_of_the_norm():
    gs = gradients(2)
    tx = ox.scale_by_geometric_subgradient(decay=0.5)
    out, _ = run(tx, gs, subgradient_norm=jnp.float32(4.0))
    expected = jax.tree.map(lambda g: g / 8, gs[1])
    jax.tree.map(lambda u, e: np.testing.assert_allclose(u, e, 1e-6), out[1], expected)
    out, _ = run(tx, gs, subgradient_norm=0.0)
    assert norm(out[1]) == 0


def test_without_normalizing_it_is_an_exponential_decay():
    gs = gradients(4)
    out, _ = run(ox.scale_by_geometric_subgradient(decay=0.7, normalize=False), gs)
    schedule = optax.scale_by_schedule(optax.exponential_decay(1.0, 1, 0.7))
    with jax.numpy_dtype_promotion("standard"):
        theirs, _ = run(optax.with_extra_args_support(schedule), gs)
    for a, b in zip(out, theirs, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-6), a, b)


def test_on_a_sharp_loss_it_converges_where_a_constant_step_circles():
    def run_on_absolute(tx):
        def step(carry, _):
            x, state = carry
            u, state = tx.update(jax.grad(lambda x: jnp.sum(jnp.abs(x)))(x), state, x)
            return (optax.apply_updates(x, u), state), None

        x = jnp.array([1.0, -0.7, 0.3])
        (x, _), _ = jax.lax.scan(step, (x, tx.init(x)), length=300)
        return float(jnp.max(jnp.abs(x)))

    geometric = ox.scale_by_geometric_subgradient(decay=0.95)
    assert run_on_absolute(optax.chain(geometric, optax.scale(-0.3))) < 1e-6
    constant = ox.scale_by_geometric_subgradient(decay=1.0)
    assert run_on_absolute(optax.chain(constant, optax.scale(-0.3))) > 0.01


@pytest.mark.parametrize("decay", [0.0, 1.1, -0.5])
def test_a_decay_outside_its_range_is_named(decay):
    with pytest.raises(ValueError, match="scale_by_geometric_subgradient: decay must"):
        ox.scale_by_geometric_subgradient(decay)
