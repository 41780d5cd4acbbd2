"""Gradient entanglement, and the direction that avoids it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox


def trees(seed=0, shared=0.0, dtype=float):
    """Two gradients; `shared` of one and the same added to both."""
    rng = np.random.default_rng(seed)
    shapes = {"w": (4, 3), "b": (5,)}

    def tree():
        return {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}

    common = tree()
    return [jax.tree.map(lambda x, c: x + shared * c, tree(), common) for _ in range(2)]


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


@pytest.mark.parametrize(("d_w", "d_l"), [(1.0, 1.0), (0.8, 0.5), (0.1, 2.0)])
@pytest.mark.parametrize("shared", [-3.0, 0.0, 3.0])
def test_the_numbers_are_those_of_the_flat_vectors(x64, d_w, d_l, shared):
    chosen, rejected = trees(shared=abs(shared))
    if shared < 0:
        rejected = jax.tree.map(jnp.negative, rejected)
    got = ox.losses.gradient_entanglement(
        chosen, rejected, d_chosen=d_w, d_rejected=d_l
    )
    w, l = flat(chosen), flat(rejected)
    a, b, i = w @ w, l @ l, w @ l
    want = {
        "inner": i,
        "norm_chosen": a**0.5,
        "norm_rejected": b**0.5,
        "cosine": i / (a * b) ** 0.5,
        "delta_chosen": d_w * a - d_l * i,
        "delta_rejected": d_w * i - d_l * b,
        "threshold": min(d_w / d_l * a, d_l / d_w * b),
    }
    for name, value in want.items():
        np.testing.assert_allclose(getattr(got, name), value, rtol=1e-12)
    wrong_way = want["delta_chosen"] <= 0 or want["delta_rejected"] >= 0
    assert bool(got.entangled) == wrong_way
    assert got.entangled.dtype == bool


@pytest.mark.parametrize("step", [1e-2, 1e-4])
def test_predicted_changes_are_those_of_a_softmax_policy(x64, step):
    # To first order: off by a few times the step.
    rng = np.random.default_rng(1)
    params = {"w": jnp.asarray(rng.normal(size=(3, 4))), "b": jnp.zeros(4)}
    x = jnp.asarray(rng.normal(size=3))

    def log_prob(params, label):
        logits = params["b"] + x @ params["w"]
        return ox.losses.token_log_probs(logits, jnp.array(label))

    of_w, of_l = (jax.grad(log_prob)(params, label) for label in (0, 1))
    got = ox.losses.gradient_entanglement(of_w, of_l, d_chosen=0.7, d_rejected=0.4)
    moved = jax.tree.map(
        lambda p, w, l: p + step * (0.7 * w - 0.4 * l), params, of_w, of_l
    )
    for label, delta in enumerate((got.delta_chosen, got.delta_rejected)):
        change = log_prob(moved, label) - log_prob(params, label)
        np.testing.assert_allclose(change, step * delta, rtol=10 * step)


def test_the_normalised_direction_is_never_entangled(x64):
    # A thousand pairs whose angles have cosines of about 0.98.
    rng = np.random.default_rng(7)
    common = 7 * rng.normal(size=(1000, 20))
    chosen, rejected = (common + rng.normal(size=(1000, 20)) for _ in range(2))
    arrays = jnp.asarray(chosen), jnp.asarray(rejected)
    direction = jax.vmap(ox.losses.pairwise_normalized_gradient)(*arrays)
    assert np.all((np.asarray(direction) * chosen).sum(1) > 0)
    assert np.all((np.asarray(direction) * rejected).sum(1) < 0)
    found = jax.vmap(ox.losses.gradient_entanglement)(*arrays)
    assert float(found.cosine.mean()) == pytest.approx(0.98, abs=0.005)
    assert found.entangled.any()


@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_the_direction_is_a_difference_of_scaled_gradients(x64, eps):
    chosen, rejected = trees(2)
    got = ox.losses.pairwise_normalized_gradient(chosen, rejected, eps=eps)
    w, l = flat(chosen), flat(rejected)
    want = w / (np.linalg.norm(w) + eps) - l / (np.linalg.norm(l) + eps)
    np.testing.assert_allclose(flat(got), want, rtol=1e-12)


def test_a_gradient_of_zero_has_no_angle_and_adds_nothing():
    chosen, rejected = trees(3, dtype=jnp.float32)
    zero = jax.tree.map(jnp.zeros_like, rejected)
    found = ox.losses.gradient_entanglement(chosen, zero)
    assert jnp.isnan(found.cosine)
    assert found.delta_chosen > 0 and found.delta_rejected == 0
    direction = ox.losses.pairwise_normalized_gradient(chosen, zero)
    assert np.linalg.norm(flat(direction)) == pytest.approx(1, rel=1e-6)
    nothing = ox.losses.pairwise_normalized_gradient(zero, zero)
    np.testing.assert_array_equal(flat(nothing), np.zeros(17))


def test_a_loss_that_takes_no_step_is_not_entangled():
    # The hinge has weights of 0 on pairs that are right already.
    found = ox.losses.gradient_entanglement(
        *trees(4, shared=9.0, dtype=jnp.float32), d_chosen=0.0, d_rejected=0.0
    )
    assert found.delta_chosen == found.delta_rejected == 0
    assert jnp.isnan(found.threshold) and not found.entangled


def test_leaves_keep_their_dtype_and_are_computed_in_float32():
    chosen, rejected = trees(5, dtype=jnp.bfloat16)
    wide = [
        jax.tree.map(lambda x: x.astype(jnp.float32), t) for t in (chosen, rejected)
    ]
    found = ox.losses.gradient_entanglement(chosen, rejected)
    assert found == ox.losses.gradient_entanglement(*wide)
    assert found.inner.dtype == jnp.float32
    direction = ox.losses.pairwise_normalized_gradient(chosen, rejected)
    want = ox.losses.pairwise_normalized_gradient(*wide)
    for got, expected in zip(*map(jax.tree.leaves, (direction, want)), strict=True):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_array_equal(got, expected.astype(jnp.bfloat16))


def test_leaves_that_are_not_trained_are_left_alone():
    chosen, rejected = trees(6, dtype=jnp.float32)
    holes = {"frozen": None, "masked": optax.MaskedNode()}
    got = ox.losses.gradient_entanglement({**chosen, **holes}, {**rejected, **holes})
    want = ox.losses.gradient_entanglement(chosen, rejected)
    np.testing.assert_allclose(jnp.stack(got[:7]), jnp.stack(want[:7]), rtol=1e-6)
    direction: Any = ox.losses.pairwise_normalized_gradient(
        {**chosen, **holes}, {**rejected, **holes}
    )
    assert direction["frozen"] is None


def test_both_work_under_jit_and_vmap():
    batch = [trees(seed, dtype=jnp.float32) for seed in range(3)]
    chosen, rejected = (
        jax.tree.map(lambda *x: jnp.stack(x), *(pair[i] for pair in batch))
        for i in (0, 1)
    )
    for fn in (
        ox.losses.gradient_entanglement,
        ox.losses.pairwise_normalized_gradient,
    ):
        mapped = jax.jit(jax.vmap(fn))(chosen, rejected)
        for i, pair in enumerate(batch):
            for got, want in zip(
                jax.tree.leaves(mapped), jax.tree.leaves(fn(*pair)), strict=True
            ):
                np.testing.assert_allclose(got[i], want, rtol=1e-4, atol=1e-6)


def test_bad_arguments_are_named():
    x, y = {"w": jnp.ones(2)}, {"w": jnp.ones(3)}
    fns = (ox.losses.gradient_entanglement, ox.losses.pairwise_normalized_gradient)
    for fn in fns:
        for other in (y, {"v": jnp.ones(2)}):
            with pytest.raises(AssertionError, match="grad_chosen, grad_rejected"):
                fn(x, other)
    for name in ("d_chosen", "d_rejected"):
        with pytest.raises(ValueError, match=f"{name} must lie in"):
            fns[0](x, x, **{name: -1.0})
    with pytest.raises(ValueError, match="eps must lie in"):
        fns[1](x, x, eps=-1.0)
