"""SparsePO: masks of tokens in DPO."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ext as ox

SIDES = ("chosen", "rejected")
WHERE = {
    "chosen_where": jnp.arange(6)[None] < jnp.array([6, 4, 1])[:, None],
    "rejected_where": jnp.arange(4)[None] < jnp.array([4, 2, 3])[:, None],
}


def pairs(seed=0, dtype=float) -> dict[str, Any]:
    """Log-probabilities, KL and masks of both answers of three pairs, by name."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for side, length in zip(SIDES, (6, 4), strict=True):
        shape = (3, length)
        arrays[f"{side}_log_probs"] = rng.normal(-1.5, 0.7, shape)
        arrays[f"ref_{side}_log_probs"] = rng.normal(-1.5, 0.7, shape)
        arrays[f"{side}_kl"] = rng.uniform(0, 1, shape)
        for mask in ("reward_mask", "kl_mask"):
            arrays[f"{side}_{mask}"] = np.maximum(rng.normal(0.3, 0.5, shape), 0)
    return {name: jnp.asarray(x, dtype) for name, x in arrays.items()}


def plain(arrays):
    """Only what the loss requires."""
    return {name: x for name, x in arrays.items() if name.endswith("log_probs")}


def sums(arrays):
    """Of the plain ones over the tokens that count: w, l, and the reference's."""
    return [
        np.where(WHERE[f"{side}_where"], arrays[f"{ref}{side}_log_probs"], 0).sum(1)
        for ref in ("", "ref_")
        for side in SIDES
    ]


@pytest.mark.parametrize(
    ("beta", "l1_reward", "l1_kl"), [(0.1, 0.0, 0.0), (0.8, 0.3, 0.05)]
)
def test_the_loss_is_the_printed_formula(x64, beta, l1_reward, l1_kl):
    arrays = pairs()
    got = ox.losses.sparse_po_loss(
        **arrays, **WHERE, beta=beta, l1_reward=l1_reward, l1_kl=l1_kl
    )
    u, kl, size_r, size_k = {}, {}, 0, 0
    for side in SIDES:
        x = {
            name: np.where(WHERE[f"{side}_where"], arrays[name], 0)
            for name in arrays
            if side in name
        }
        log_ratio = x[f"{side}_log_probs"] - x[f"ref_{side}_log_probs"]
        reward_mask, kl_mask = x[f"{side}_reward_mask"], x[f"{side}_kl_mask"]
        u[side] = (reward_mask * log_ratio).sum(1)
        kl[side] = (kl_mask * x[f"{side}_kl"]).sum(1)
        size_r, size_k = size_r + reward_mask.sum(1), size_k + kl_mask.sum(1)
    margin = u["chosen"] - u["rejected"] - (kl["rejected"] - kl["chosen"])
    want = np.log1p(np.exp(-beta * margin)) + l1_reward * size_r + l1_kl * size_k
    np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize("beta", [0.1, 0.6])
def test_without_masks_and_kl_it_is_dpo(x64, beta):
    arrays = plain(pairs(1))
    got = ox.losses.sparse_po_loss(**arrays, **WHERE, beta=beta)
    want = ox.losses.dpo_loss(*map(jnp.asarray, sums(arrays)), beta=beta)
    np.testing.assert_allclose(got, want, rtol=1e-13)


def test_with_kl_and_masks_of_ones_it_is_tdpo1(x64):
    # TDPO1's margin: DPO's, minus KL on the rejected, plus KL on the chosen.
    arrays = pairs(2)
    given = {name: x for name, x in arrays.items() if "mask" not in name}
    got = ox.losses.sparse_po_loss(**given, **WHERE, beta=0.5)
    w, l, ref_w, ref_l = sums(arrays)
    kl_w, kl_l = (
        np.where(WHERE[f"{side}_where"], arrays[f"{side}_kl"], 0).sum(1)
        for side in SIDES
    )
    want = np.log1p(np.exp(-0.5 * ((w - l) - (ref_w - ref_l) - (kl_l - kl_w))))
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_masks_of_zeros_lose_log_two_and_teach_nothing(x64):
    arrays = pairs(3)
    arrays |= {k: jnp.zeros_like(x) for k, x in arrays.items() if "mask" in k}

    def losses(w, l):
        now = {"chosen_log_probs": w, "rejected_log_probs": l}
        return ox.losses.sparse_po_loss(**{**arrays, **now}, **WHERE)

    now = [arrays[f"{side}_log_probs"] for side in SIDES]
    np.testing.assert_allclose(losses(*now), jnp.full(3, jnp.log(2.0)), rtol=1e-15)
    for grad in jax.grad(lambda *x: losses(*x).sum(), (0, 1))(*now):
        np.testing.assert_array_equal(grad, jnp.zeros_like(grad))


def gradients(arrays, **options):
    def total(arrays):
        return ox.losses.sparse_po_loss(**arrays, **WHERE, **options).sum()

    return jax.grad(total)(arrays)


def test_tokens_that_do_not_count_have_no_gradient_and_the_reference_has_none():
    arrays = pairs(4, jnp.float32)
    grads = gradients(arrays, l1_reward=0.1, l1_kl=0.1)
    for side in SIDES:
        outside = ~WHERE[f"{side}_where"]
        for name in ("log_probs", "kl", "reward_mask", "kl_mask"):
            grad = grads[f"{side}_{name}"]
            np.testing.assert_array_equal(grad[outside], 0 * grad[outside])
            assert jnp.any(grad != 0)
        unweighted = arrays[f"{side}_reward_mask"] == 0
        grad = grads[f"{side}_log_probs"]
        np.testing.assert_array_equal(grad[unweighted], 0 * grad[unweighted])
        reference = grads[f"ref_{side}_log_probs"]
        np.testing.assert_array_equal(reference, jnp.zeros_like(reference))


def test_the_penalty_pulls_weights_down_but_leaves_zeros_alone(x64):
    arrays = pairs(5)
    without, with_penalty = gradients(arrays), gradients(arrays, l1_reward=0.7)
    for side in SIDES:
        name = f"{side}_reward_mask"
        counts = WHERE[f"{side}_where"] & (arrays[name] > 0)
        want = jnp.where(counts, 0.7, 0.0)
        got = with_penalty[name] - without[name]
        np.testing.assert_allclose(got, want, rtol=1e-13, atol=1e-15)


def test_bad_arguments_are_named():
    arrays = pairs(6, jnp.float32)
    for name in arrays:
        if not name.endswith("log_probs") or name.startswith("ref"):
            short = {**arrays, name: arrays[name][:, :-1]}
            with pytest.raises(AssertionError, match=name):
                ox.losses.sparse_po_loss(**short)
    with pytest.raises(AssertionError, match="chosen_where"):
        ox.losses.sparse_po_loss(**arrays, chosen_where=jnp.ones(6, bool))
    rejected = {k: x[:2] for k, x in arrays.items() if "rejected" in k}
    with pytest.raises(AssertionError, match="as many answers"):
        ox.losses.sparse_po_loss(**{**arrays, **rejected})
    for name, value in {"beta": 0.0, "l1_reward": -1.0, "l1_kl": -1.0}.items():
        arguments: dict[str, Any] = {**arrays, name: value}
        with pytest.raises(ValueError, match=f"{name} must lie in"):
            ox.losses.sparse_po_loss(**arguments)


@pytest.mark.parametrize("trailing", [(), (5,), (2, 5)])
def test_activation_masks_are_means_rescaled_to_the_unit_interval(x64, trailing):
    rng = np.random.default_rng(7)
    activations = rng.normal(size=(3, 6, *trailing))
    where = np.asarray(WHERE["chosen_where"])
    got = ox.losses.activation_token_mask(jnp.asarray(activations), jnp.asarray(where))
    mean = activations.reshape(3, 6, -1).mean(-1)
    for i, kept in enumerate(where):
        a = mean[i, kept]
        spread = np.ptp(a) or 1
        np.testing.assert_allclose(got[i, kept], (a - a.min()) / spread, rtol=1e-12)
        np.testing.assert_array_equal(got[i, ~kept], 0)


def test_activation_masks_of_constant_or_empty_rows_are_zero_and_detached():
    where = jnp.array([[True, True], [False, False]])
    got = ox.losses.activation_token_mask(jnp.full((2, 2, 3), 21.7), where)
    np.testing.assert_array_equal(got, jnp.zeros((2, 2)))
    grad = jax.grad(lambda x: ox.losses.activation_token_mask(x, where).sum())(
        jnp.arange(12.0).reshape(2, 2, 3)
    )
    np.testing.assert_array_equal(grad, jnp.zeros((2, 2, 3)))
    with pytest.raises(AssertionError, match="axes of where"):
        ox.losses.activation_token_mask(jnp.zeros((2, 3)), where)


def network(seed=8, dtype=float):
    rng = np.random.default_rng(seed)
    shapes = {"hidden_states": (3, 2, 5, 4), "kernels": (3, 4)}
    shapes |= {"biases": (3,), "mixer": (3,)}
    return {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}


def test_sparse_masks_are_the_printed_network(x64):
    given = network()
    h, w, b, alpha = (np.asarray(x) for x in given.values())
    total = np.zeros((2, 5))
    for layer in range(3):
        x = h[layer] - h[layer].mean(-1, keepdims=True)
        normal = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        total += alpha[layer] * np.maximum(normal @ w[layer] + b[layer], 0)
    got = ox.losses.sparse_token_mask(**given)
    np.testing.assert_allclose(got, np.maximum(total, 0), rtol=1e-12, atol=1e-15)
    assert 0 < (got == 0).sum() < got.size


def test_gradients_flow_into_the_network_but_not_into_the_reference():
    given = network(9, jnp.float32)
    grads = jax.grad(lambda g: ox.losses.sparse_token_mask(**g).sum())(given)
    np.testing.assert_array_equal(
        grads.pop("hidden_states"), jnp.zeros_like(given["hidden_states"])
    )
    assert all(jnp.any(grad != 0) for grad in grads.values())


def test_identical_hidden_states_of_zero_are_harmless():
    given = network(10, jnp.float32)
    zero = {**given, "hidden_states": jnp.zeros_like(given["hidden_states"])}
    value, grads = jax.value_and_grad(
        functools.partial(lambda g: ox.losses.sparse_token_mask(**g).sum())
    )(zero)
    assert jnp.isfinite(value)
    assert all(jnp.all(jnp.isfinite(grad)) for grad in grads.values())


@pytest.mark.parametrize("name", ["hidden_states", "kernels", "biases", "mixer"])
def test_shapes_of_the_network_that_do_not_fit_are_named(name):
    given = network(11, jnp.float32)
    given[name] = given[name][0, 0] if name == "hidden_states" else given[name][:2]
    with pytest.raises(AssertionError, match=name):
        ox.losses.sparse_token_mask(**given)
