"""The learned optimizer that is a small network."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox
from optax_ext.transforms.learned import _descent_theta

GOLDEN = pathlib.Path(__file__).parents[1] / "goldens/wrappers_schedules/mlp_lopt.npz"
PARAMS = {"w": jnp.arange(6.0).reshape(2, 3) / 6, "b": jnp.ones(3), "s": jnp.float32(2)}
GRADS = jax.tree.map(lambda p: jnp.cos(3 * p), PARAMS)


def theta(**changed):
    return {**ox.init_mlp_lopt(jax.random.key(0), hidden_size=4), **changed}


def run(tx, steps=1, grads=GRADS, params=PARAMS):
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(grads, state, params)
    return updates, state


def test_the_golden_trajectory(x64):
    with np.load(GOLDEN) as file:
        arrays = {key: jnp.asarray(file[key]) for key in file.files if key != "meta"}

    def below(prefix):
        return {k[len(prefix) :]: x for k, x in arrays.items() if k.startswith(prefix)}

    scales, wanted, grads = below("x/mup_scale/"), below("p/"), below("g/")
    tx = optax.chain(
        ox.scale_by_mlp_lopt(below("x/theta/"), exp_mult=0.001, step_mult=0.001),
        optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, scales)),
        optax.scale(-1.0),
    )
    params = below("p0/")
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(len(grads["bias"])):
        now = jax.tree.map(lambda g: g[t], grads)
        updates, state = update(now, state, params)
        params = optax.apply_updates(params, updates)
        for name, want in wanted.items():
            np.testing.assert_allclose(params[name], want[t], rtol=1e-11, atol=1e-13)


def test_an_output_layer_of_zeros_does_not_move():
    tx = ox.scale_by_mlp_lopt(theta(w2=jnp.zeros((4, 2))))
    updates, _ = run(tx, steps=2)
    for leaf in jax.tree.leaves(updates):
        np.testing.assert_array_equal(leaf, 0)


def test_an_output_layer_of_biases_moves_every_entry_alike():
    tx = ox.scale_by_mlp_lopt(
        theta(w2=jnp.zeros((4, 2)), b2=jnp.array([0.7, 20.0])),
        exp_mult=0.1,
        step_mult=0.01,
    )
    for leaf in jax.tree.leaves(run(tx)[0]):
        np.testing.assert_allclose(leaf, 0.7 * np.exp(2.0) * 0.01, rtol=1e-6)


def test_a_network_that_only_sees_the_gradient_normalises_it():
    updates, _ = run(ox.scale_by_mlp_lopt(_descent_theta(), step_mult=0.5))
    for u, g in zip(jax.tree.leaves(updates), jax.tree.leaves(GRADS), strict=True):
        rms = np.sqrt(1e-5 + np.mean(np.square(g)))
        np.testing.assert_allclose(u, 0.5 * g / rms, rtol=2e-6)


def test_averages_are_those_of_adam_and_adafactor_without_correction():
    grads, params = {"w": GRADS["w"]}, {"w": PARAMS["w"]}
    _, state = run(ox.scale_by_mlp_lopt(theta()), 2, grads, params)
    g, decays = np.asarray(grads["w"]), np.array([0.9, 0.99, 0.999])
    left = 1 - decays**2
    np.testing.assert_allclose(state.mu["w"], left[:, None, None] * g, rtol=1e-4)
    np.testing.assert_allclose(state.nu["w"], left[2] * g**2, rtol=1e-4)
    rows = left[:, None] * np.mean(g**2, 1)  # 3 columns are more than 2 rows
    np.testing.assert_allclose(state.rows["w"][..., 0], rows, rtol=1e-4)
    columns = left[:, None] * np.mean(g**2, 0)
    np.testing.assert_allclose(state.columns["w"][:, 0], columns, rtol=1e-4)


def test_offsets_move_the_decays_on_a_logarithmic_scale():
    # 1 - d is multiplied by e^(10 theta): 0.1 becomes 0.2.
    offset = jnp.full(3, np.log(2) / 10)
    _, state = run(ox.scale_by_mlp_lopt(theta(momentum_decays=offset)))
    np.testing.assert_allclose(state.mu["b"][0], 0.2 * GRADS["b"], rtol=1e-5)
    # Those of second moments end at 0, where only the last square is left.
    many = {"rms_decays": jnp.ones(1), "adafactor_decays": jnp.ones(3)}
    _, state = run(ox.scale_by_mlp_lopt(theta(**many)), steps=2)
    np.testing.assert_allclose(state.nu["b"], GRADS["b"] ** 2, rtol=1e-6)
    np.testing.assert_allclose(state.rows["b"][2], GRADS["b"] ** 2, rtol=1e-6)


def test_the_shapes_of_the_averages():
    shapes = {"conv": (2, 2, 3, 4), "equal": (5, 5), "b": (5,), "s": ()}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    state = ox.scale_by_mlp_lopt(theta()).init(params)
    assert state.mu["conv"].shape == (3, 2, 2, 3, 4)
    assert state.rows["conv"].shape == (3, 2, 2, 3, 1)
    assert state.columns["conv"].shape == (3, 2, 2, 1, 4)
    # Of equal axes the last is the longest.
    assert state.rows["equal"].shape == (3, 5, 1)
    assert (state.rows["b"].shape, state.columns["b"].shape) == ((3, 5), ())
    assert (state.rows["s"].shape, state.nu["s"].shape) == ((3,), ())


def test_nan_entries_count_as_zero():
    broken = {**GRADS, "b": GRADS["b"].at[1].set(jnp.nan)}
    mended = {**GRADS, "b": GRADS["b"].at[1].set(0.0)}
    got, want = (run(ox.scale_by_mlp_lopt(theta()), 2, g) for g in (broken, mended))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_time_reaches_the_network():
    tx = ox.scale_by_mlp_lopt(
        theta(w0=jnp.zeros((39, 4)).at[28:].set(1.0), b0=jnp.full(4, 11.0)),
        step_mult=1.0,
    )
    first, _ = run(tx)
    later, _ = run(tx, steps=2)
    assert not np.allclose(first["b"], later["b"], rtol=1e-3)
    np.testing.assert_allclose(first["b"], first["b"][0], rtol=1e-6)


def test_it_can_be_trained_through():
    def moved(t):
        return sum(
            jnp.sum(u**2) for u in jax.tree.leaves(run(ox.scale_by_mlp_lopt(t))[0])
        )

    slope = jax.jit(jax.grad(moved))(theta())
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(slope))
    assert jnp.any(slope["w0"] != 0)


def test_untrained_weights_are_normal_and_cut():
    made = ox.init_mlp_lopt(jax.random.key(0))
    assert (made["w0"].shape, made["w1"].shape) == ((39, 32), (32, 32))
    assert made["w2"].shape == (32, 2)
    for name in ("w0", "w1", "w2"):
        deviations = np.asarray(made[name]) * made[name].shape[0] ** 0.5
        assert np.abs(deviations).max() <= 2
        # A normal number cut at 2 deviations has 0.88 of them left.
        np.testing.assert_allclose(deviations.std(), 0.88, rtol=0.15)
    others = [x for name, x in made.items() if name[0] != "w"]
    assert not any(x.any() for x in others)


def test_meta_parameters_that_do_not_fit_are_named():
    good = theta()
    for broken, message in [
        ({k: x for k, x in good.items() if k != "w1"}, r"'w1'\] must .* got nothing"),
        (theta(w0=jnp.zeros((38, 4))), r"'w0'\] must have shape \(39, 4\), got \(38"),
        (theta(rms_decays=jnp.zeros(3)), r"'rms_decays'\] must have shape \(1,\)"),
        ({}, "got nothing; init_mlp_lopt makes all"),
    ]:
        with pytest.raises(ValueError, match=f"^scale_by_mlp_lopt: theta.*{message}"):
            ox.scale_by_mlp_lopt(broken)
    with pytest.raises(ValueError, match="hidden_size must be an integer"):
        ox.init_mlp_lopt(jax.random.key(0), hidden_size=0)
    tx = ox.scale_by_mlp_lopt(good)
    with pytest.raises(ValueError, match="scale_by_mlp_lopt needs the parameters"):
        tx.update(GRADS, tx.init(PARAMS))
