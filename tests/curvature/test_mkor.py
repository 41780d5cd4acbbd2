"""MKOR: layers preconditioned by inverse factors that rank-1 updates move."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization

import optax_ext as ox

LAYERS = {"d": (("d", "kernel"), ("d", "bias")), "conv": ("conv/kernel", None)}
SHAPES = {
    "d": {"kernel": (5, 3), "bias": (3,)},
    "conv": {"kernel": (2, 2, 2, 4)},
    "scale": (),
}


def normal(*shape, seed=0, size=1.0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(size * rng.normal(size=shape), float)


def gradients(seed=0, size=1.0, dtype=float):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: jnp.asarray(size * rng.normal(size=s), dtype),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def statistics(seed=0, size=1.0):
    return {
        "activations": {
            "d": normal(5, seed=seed, size=size),
            "conv": normal(8, seed=seed + 1, size=size),
        },
        "preact_grads": {
            "d": normal(3, seed=seed + 2, size=size),
            "conv": normal(4, seed=seed + 3, size=size),
        },
    }


def run(tx, steps, seeds=lambda t: t, size=1.0):
    state, out = tx.init(gradients()), []
    update = jax.jit(tx.update)
    for t in range(steps):
        g = gradients(seeds(t), size)
        updates, state = update(g, state, **statistics(10 * t, size))
        out.append(updates)
    return out, state


def test_exact_factors_are_the_inverses_of_averaged_second_moments(x64):
    tx = ox.scale_by_mkor(LAYERS, 0.9, 1, variant="exact", stabilization_threshold=1e9)
    state, update = tx.init(gradients()), jax.jit(tx.update)
    r, l = np.eye(6), np.eye(3)
    for t in range(50):
        given = statistics(10 * t)
        a = np.append(given["activations"]["d"], 1.0)
        s = np.asarray(given["preact_grads"]["d"])
        r, l = 0.9 * r + 0.1 * np.outer(a, a), 0.9 * l + 0.1 * np.outer(s, s)
        _, state = update(gradients(t), state, **given)
        factors = state.factors["d"]
        np.testing.assert_allclose(factors.inputs, np.linalg.inv(r), atol=1e-11)
        np.testing.assert_allclose(factors.outputs, np.linalg.inv(l), atol=1e-11)


def test_reference_factors_are_symmetric_between_0_and_the_identity(x64):
    for factors in run(ox.scale_by_mkor(LAYERS, update_interval=1), 8)[1][1].values():
        for m in factors:
            np.testing.assert_allclose(m, m.T, rtol=0, atol=1e-14)
            values = np.linalg.eigvalsh(m)
            assert 0 < values.min()
            assert values.max() <= 1 + 1e-12


def test_before_the_second_refresh_reference_emits_the_gradient():
    out, state = run(ox.scale_by_mkor(LAYERS, update_interval=3), 4)
    for t in range(3):
        want = gradients(t)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), out[t], want
        )
    assert jnp.abs(out[3]["d"]["kernel"] - gradients(3)["d"]["kernel"]).max() > 0.1
    assert state.factors["conv"].inputs.shape == (8, 8)


@pytest.mark.parametrize("variant", ["reference", "exact"])
def test_lengths_of_kernel_and_bias_add_up_to_those_of_the_gradient(x64, variant):
    out, _ = run(ox.scale_by_mkor(LAYERS, update_interval=1, variant=variant), 3)
    for u, g in zip(out, map(gradients, range(3)), strict=True):
        for name in ("d", "conv"):
            lengths = [
                sum(float(jnp.sqrt(jnp.sum(x**2))) for x in tree[name].values())
                for tree in (u, g)
            ]
            np.testing.assert_allclose(*lengths, rtol=1e-12)
        assert u["scale"] == g["scale"]


def test_the_update_is_the_gradient_between_both_factors(x64):
    tx = ox.scale_by_mkor(LAYERS, 0.8, 1, variant="exact")
    (u,), state = run(tx, 1)
    g = gradients(0)
    rows = np.concatenate([g["d"]["kernel"], g["d"]["bias"][None]])
    r, l = state.factors["d"]
    want = np.asarray(r) @ rows @ np.asarray(l)
    got = np.concatenate([u["d"]["kernel"], u["d"]["bias"][None]])
    np.testing.assert_allclose(got / want, (got / want)[0, 0], rtol=1e-10)


def test_large_entries_blend_the_exact_factor_with_the_identity(x64):
    # Without inputs M = I / gamma = 2 after a step: not above 2, then 4, then blended.
    zero = {
        "activations": {"d": jnp.zeros((2, 5))},
        "preact_grads": {"d": jnp.zeros(3)},
    }
    layers = {"d": (("d", "kernel"), None)}
    tx = ox.scale_by_mkor(
        layers, 0.5, 1, variant="exact", stabilization_threshold=2.0, zeta=0.75
    )
    state, seen = tx.init(gradients()), []
    for t in range(3):
        _, state = tx.update(gradients(t), state, **zero)
        seen.append(float(state.factors["d"].inputs[0, 0]))
    assert seen == [2.0, 4.0, 2 * (0.75 * 4 + 0.25)]


def test_rows_of_inputs_are_clipped_and_averaged_and_means_are_not(x64):
    rows = jnp.asarray([[1.0, -300.0, 2.0, 0.0, 5.0], [3.0, 0.0, 90.0, 0.0, 5.0]])
    mean = jnp.asarray([2.0, -50.0, 46.0, 0.0, 5.0])
    g, grad = gradients(), statistics()
    tx = ox.scale_by_mkor({"d": LAYERS["d"]}, 0.9, 1, 100.0, "exact")
    for rank in (rows, rows[:, None], mean):
        given = {"activations": {"d": rank}, "preact_grads": grad["preact_grads"]}
        got, _ = tx.update(g, tx.init(g), **given)
        if rank is rows:
            want = got
        np.testing.assert_allclose(got["d"]["kernel"], want["d"]["kernel"], rtol=1e-12)


def test_the_gradient_of_the_bias_stands_in_for_that_of_the_output(x64):
    g = gradients()
    tx = ox.scale_by_mkor({"d": LAYERS["d"]}, 0.9, 1, variant="exact")
    activations = {"d": normal(5)}
    got, _ = tx.update(g, tx.init(g), activations=activations)
    each = jnp.stack([g["d"]["bias"] / 4, 3 * g["d"]["bias"] / 4])
    for s in (g["d"]["bias"], each):
        want, _ = tx.update(
            g, tx.init(g), activations=activations, preact_grads={"d": s}
        )
        np.testing.assert_allclose(got["d"]["kernel"], want["d"]["kernel"], rtol=1e-12)


@pytest.mark.parametrize("variant", ["reference", "exact"])
@pytest.mark.parametrize("size", [0.0, 1e30, 1e-30])
def test_extreme_gradients_and_statistics_make_no_nan(variant, size):
    tx = ox.scale_by_mkor(LAYERS, update_interval=1, variant=variant)
    out, state = run(tx, 4, size=size)
    for x in jax.tree.leaves((out, state)):
        assert not jnp.isnan(x).any()
    if size == 0.0:
        assert not any(x.any() for x in jax.tree.leaves(out))


def test_16_bit_gradients_have_float32_factors_and_the_state_is_stable():
    g = gradients(dtype=jnp.bfloat16)
    tx = ox.scale_by_mkor(LAYERS, update_interval=2, variant="exact")

    def step(state, _):
        out, state = tx.update(g, state, **statistics())
        return state, out

    state = tx.init(g)
    assert all(m.dtype == jnp.float32 for m in jax.tree.leaves(state.factors))
    last, out = jax.lax.scan(step, state, length=3)
    assert out["d"]["kernel"].dtype == jnp.bfloat16
    saved = serialization.to_bytes(last)
    restored = serialization.from_bytes(tx.init(g), saved)
    jax.tree.map(np.testing.assert_array_equal, restored, last)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), g)
    assert jax.tree.structure(tx.init(shapes)) == jax.tree.structure(state)


def test_hyperparameters_can_be_mapped_over():
    def last(gamma, zeta):
        tx = ox.scale_by_mkor(LAYERS, gamma, 1, variant="exact", zeta=zeta)
        return run(tx, 2)[0][-1]["d"]["kernel"]

    pair = jax.vmap(last)(jnp.asarray([0.5, 0.9]), jnp.asarray([0.5, 0.9]))
    np.testing.assert_allclose(pair[1], last(0.9, 0.9), rtol=1e-4)


def test_a_masked_layer_is_left_alone_and_the_others_are_not():
    mask = {"d": {"kernel": True, "bias": True}, "conv": False, "scale": False}
    tx = ox.scale_by_mkor(LAYERS, update_interval=1, variant="exact")
    out, _ = run(optax.masked(tx, mask), 2)
    want, _ = run(tx, 2)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        [u["d"] for u in out],
        [u["d"] for u in want],
    )
    np.testing.assert_array_equal(
        out[1]["conv"]["kernel"], gradients(1)["conv"]["kernel"]
    )


def test_what_is_missing_is_named():
    g, given = gradients(), statistics()
    with pytest.raises(ValueError, match="no leaf has the path 'd/weight'; there are"):
        ox.scale_by_mkor({"d": ("d/weight", None)}).init(g)
    with pytest.raises(ValueError, match="'d/bias' is no matrix"):
        ox.scale_by_mkor({"d": ("d/bias", None)}).init(g)
    with pytest.raises(ValueError, match="leave it outside of bucketed"):
        ox.bucketed(ox.scale_by_mkor(LAYERS)).init(g)
    tx = ox.scale_by_mkor(LAYERS)
    with pytest.raises(ValueError, match="needs the extra argument 'activations'"):
        tx.update(g, tx.init(g))
    with pytest.raises(ValueError, match="activations lacks 'conv'"):
        tx.update(g, tx.init(g), activations={"d": given["activations"]["d"]})
    with pytest.raises(ValueError, match="'conv' has no bias"):
        tx.update(g, tx.init(g), activations=given["activations"])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"gamma": 0.0}, "gamma must lie in"),
        ({"gamma": 1.0}, "gamma must lie in"),
        ({"zeta": 2.0}, "zeta must lie in"),
        ({"clip": 0.0}, "clip must lie in"),
        ({"update_interval": 0}, "update_interval must be an integer"),
        ({"variant": "paper"}, "variant must be one of 'reference', 'exact'"),
    ],
)
def test_bad_arguments_are_named(options, match):
    with pytest.raises(ValueError, match=f"scale_by_mkor: {match}"):
        ox.scale_by_mkor(LAYERS, **options)
