"""Decay that the learning rate does not scale: the link, AdamW and SGDW."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox


def draws(shape, steps, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(steps, *shape)), dtype)


def trajectory(tx, x, gradients):
    positions, state = [], tx.init(x)
    for g in gradients:
        updates, state = tx.update(g, state, x)
        x = optax.apply_updates(x, updates)
        positions.append(x)
    return jax.tree.map(lambda *p: np.stack(p), *positions)


# The link -----------------------------------------------------------------------------


def test_the_link_takes_a_fraction_of_each_parameter_off_an_update():
    tx, x = ox.add_independent_weight_decay(0.25), jnp.asarray([4.0, -8.0])
    state = tx.init(x)
    assert state == optax.EmptyState()
    out, _ = tx.update(jnp.asarray([1.0, 1.0]), state, x)
    np.testing.assert_array_equal(out, [0.0, 3.0])


def test_behind_a_learning_rate_it_is_not_scaled_by_it():
    x = jnp.asarray([2.0])
    for rate in (0.0, 1e-3, 1.0):
        tx = optax.chain(
            optax.scale_by_learning_rate(rate), ox.add_independent_weight_decay(0.5)
        )
        np.testing.assert_array_equal(trajectory(tx, x, jnp.zeros((1, 1))), [[1.0]])


def test_a_schedule_of_the_link_is_read_from_0_and_counted_in_the_state():
    tx = ox.add_independent_weight_decay(lambda count: (count + 1) / 4)
    x = jnp.ones(1)
    state = tx.init(x)
    assert isinstance(state, ox.IndependentDecayState)
    for t in (1, 2, 3):
        out, state = tx.update(jnp.zeros(1), state, x)
        np.testing.assert_array_equal(out, [-t / 4])
    assert state.count == 3


@pytest.mark.parametrize(
    "mask",
    [{"a": True, "b": False}, lambda params: {"a": True, "b": False}],
    ids=["tree", "function"],
)
def test_masked_leaves_do_not_decay(mask):
    x = {"a": jnp.full(1, 2.0), "b": jnp.full(1, 2.0)}
    zeros = jax.tree.map(jnp.zeros_like, x)
    for tx in (
        ox.add_independent_weight_decay(0.5, mask),
        ox.adamw_decoupled(0.1, weight_decay=0.5, mask=mask),
        ox.sgdw(0.1, weight_decay=0.5, mask=mask),
    ):
        out, _ = tx.update(zeros, tx.init(x), x)
        assert (float(out["a"][0]), float(out["b"][0])) == (-1.0, 0.0)


@pytest.mark.parametrize(
    "tx", [ox.add_independent_weight_decay(0.1), ox.adamw_decoupled(0.1), ox.sgdw(0.1)]
)
def test_without_parameters_they_say_so(tx):
    x = jnp.ones(2)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(x, tx.init(x))


# The optimizers -----------------------------------------------------------------------


def cosine(count):
    return 0.5 * (1 + jnp.cos(jnp.pi * count / 30))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("make", [ox.adamw_decoupled, ox.sgdw])
def test_without_gradient_the_parameters_shrink_whatever_the_rate(make):
    for rate in (1e-3, 1.0):
        tx = make(rate, weight_decay=0.004)
        x = trajectory(tx, jnp.ones(1), jnp.zeros((24, 1)))
        np.testing.assert_allclose(x[-1], [0.9082891413], rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_it_is_optax_adamw_with_another_rate_of_decay():
    g, x = draws((5,), 30, jnp.float64), jnp.linspace(-1.0, 1.0, 5)
    options = {"b1": 0.8, "b2": 0.9, "eps": 1e-3, "eps_root": 1e-4}
    with jax.numpy_dtype_promotion("standard"):
        for eta, rate in ((1.0, 0.02), (cosine, lambda count: 0.02 * cosine(count))):
            ours = ox.adamw_decoupled(0.02, **options, weight_decay=0.1, schedule=eta)
            theirs = optax.adamw(rate, **options, weight_decay=0.1 / 0.02)
            np.testing.assert_allclose(
                trajectory(ours, x, g), trajectory(theirs, x, g), rtol=0, atol=1e-15
            )


def test_a_schedule_as_learning_rate_leaves_the_decay():
    x = jnp.asarray([4.0])
    for make in (ox.adamw_decoupled, ox.sgdw):
        tx = make(lambda count: 0.0 * count, weight_decay=0.5)
        with jax.numpy_dtype_promotion("standard"):
            path = trajectory(tx, x, jnp.ones((3, 1)))
        np.testing.assert_array_equal(path, [[2.0], [1.0], [0.5]])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("eta", "positions"),
    [((1, 0, 0), (-0.1, -0.19, -0.271)), ((1, 1, 1), (-0.1, -0.29, -0.561))],
)
def test_the_schedule_of_sgdw_is_inside_the_momentum(eta, positions):
    steps = jnp.asarray(eta, float)
    tx = ox.sgdw(0.1, weight_decay=0.0, schedule=lambda count: steps[count])
    path = trajectory(tx, jnp.zeros(1), jnp.ones((3, 1)))
    np.testing.assert_allclose(path[:, 0], positions, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_sgdw_by_its_two_lines():
    g = draws((3,), 20, jnp.float64)
    tx = ox.sgdw(0.3, momentum=0.7, weight_decay=0.05, schedule=cosine)
    x = m = np.zeros(3)
    want = []
    for t, g_t in enumerate(np.asarray(g)):
        eta = 0.5 * (1 + np.cos(np.pi * t / 30))
        m = 0.7 * m + eta * 0.3 * g_t
        x = x - m - eta * 0.05 * x
        want.append(x)
    with jax.numpy_dtype_promotion("standard"):
        ours = trajectory(tx, jnp.zeros(3), g)
    np.testing.assert_allclose(ours, want, rtol=1e-11)


@pytest.mark.usefixtures("x64")
def test_optax_schedules_are_read_in_float64():
    # Called with an int32 count they would be float32, and wrong by 1e-8.
    schedule = optax.polynomial_schedule(1.0, 0.0, 1.0, 7)
    tx = ox.sgdw(1.0, momentum=0.0, weight_decay=0.0, schedule=schedule)
    path = trajectory(tx, jnp.zeros(1), jnp.ones((2, 1)))
    np.testing.assert_allclose(path[:, 0], [-1.0, -1.0 - 6 / 7], rtol=1e-15)


def test_a_number_as_schedule_scales_step_and_decay():
    g, x = draws((4,), 5), jnp.ones(4)
    for make in (ox.adamw_decoupled, ox.sgdw):
        half = trajectory(make(0.2, weight_decay=0.1, schedule=0.5), x, g)
        same = trajectory(make(0.1, weight_decay=0.05), x, g)
        np.testing.assert_allclose(half, same, rtol=1e-6)


def test_the_first_moment_of_adamw_is_kept_in_mu_dtype():
    state = ox.adamw_decoupled(0.1, mu_dtype=jnp.bfloat16).init(jnp.ones(2))
    assert optax.tree.get(state, "mu").dtype == jnp.bfloat16


def test_normalized_weight_decay():
    decay = ox.normalized_weight_decay(0.05, 128, 50_000, 100)
    np.testing.assert_allclose(decay, 2.5298221281e-4, rtol=1e-10)
    # Four times the steps, half the decay.
    longer = ox.normalized_weight_decay(0.05, 128, 50_000, 400)
    np.testing.assert_allclose(longer, decay / 2, rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "bad"),
    [
        (ox.adamw_decoupled, {"learning_rate": -1.0}),
        (ox.adamw_decoupled, {"schedule": -1.0}),
        (ox.adamw_decoupled, {"b1": 1.0}),
        (ox.sgdw, {"momentum": 1.0}),
        (ox.sgdw, {"schedule": -1.0}),
        (ox.sgdw, {"weight_decay": float("nan")}),
    ],
)
def test_an_argument_outside_its_range_is_named(make, bad):
    with pytest.raises(ValueError, match=f"{make.__name__}: {next(iter(bad))} must"):
        make(**{"learning_rate": 0.1, **bad})


@pytest.mark.parametrize("bad", ["batch_size", "dataset_size", "epochs"])
def test_a_length_of_0_is_named(bad):
    sizes = {"batch_size": 1, "dataset_size": 1, "epochs": 1, bad: 0}
    with pytest.raises(ValueError, match=f"normalized_weight_decay: {bad} must"):
        ox.normalized_weight_decay(0.1, **sizes)
    with pytest.raises(TypeError, match="add_independent_weight_decay: weight_decay"):
        ox.add_independent_weight_decay("0.1")
