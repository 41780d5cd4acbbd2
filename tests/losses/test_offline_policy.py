"""A-LoL and its variants."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox

VARIANTS = ("sequence", "token", "ref_free", "kl", "reward")


def answers(seed=0, dtype=float):
    rng = np.random.default_rng(seed)
    ref = rng.normal(-1.5, 0.7, (5, 4))
    arrays = (ref + rng.normal(0, 0.5, (5, 4)), ref, rng.normal(size=5))
    arrays = (*arrays, rng.normal(size=5))
    where = jnp.arange(4)[None] < jnp.array([4, 3, 2, 1, 0])[:, None]
    return (*(jnp.asarray(x, dtype) for x in arrays), where)


def printed(now, rest, where, variant, clip, kl):
    """The table of variants in NumPy: value, and gradient by token."""
    now, ref, rewards, values, m = map(np.asarray, (now, *rest, where))
    a = np.asarray(rewards if variant == "reward" else np.maximum(rewards - values, 0))
    s, s_ref = (now * m).sum(1), (ref * m).sum(1)
    whole = np.clip(np.exp(s - s_ref), 1 - clip, 1 + clip)[:, None]
    weight = {
        "token": np.clip(np.exp(now - ref), 1 - clip, 1 + clip),
        "ref_free": 1.0,
        "kl": 1.0,
    }.get(variant, whole)
    grad = -a[:, None] * weight * m
    value = (grad * now).sum(1)
    if variant == "kl":
        value, grad = value + kl * (s - s_ref), grad + kl * m
    return value, grad


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("clip", "kl"), [(0.9, 0.0), (0.3, 0.2)])
def test_every_variant_is_the_printed_formula_with_a_detached_ratio(
    x64, variant, clip, kl
):
    now, *rest, where = answers()

    def losses(now):
        return ox.losses.a_lol_loss(
            now, *rest, where=where, variant=variant, clip_range=clip, kl_beta=kl
        )

    value, grad = printed(now, rest, where, variant, clip, kl)
    np.testing.assert_allclose(losses(now), value, rtol=1e-12, atol=1e-15)
    got = jax.grad(lambda now: losses(now).sum())(now)
    np.testing.assert_allclose(got, grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("variant", ["sequence", "token", "ref_free"])
def test_answers_no_better_than_expected_count_for_nothing(variant):
    now, ref, _, values, where = answers(1, jnp.float32)
    value, grad = jax.value_and_grad(
        lambda x: ox.losses.a_lol_loss(
            x, ref, values - 0.5, values, where=where, variant=variant
        ).sum()
    )(now)
    assert value == 0
    np.testing.assert_array_equal(grad, jnp.zeros_like(now))


def test_at_the_reference_it_is_advantage_weighted_likelihood(x64):
    now, _, rewards, values, where = answers(2)
    want = -np.maximum(np.asarray(rewards - values), 0) * (
        np.asarray(now) * np.asarray(where)
    ).sum(1)
    for variant in ("sequence", "token", "ref_free", "kl"):
        got = ox.losses.a_lol_loss(
            now, now, rewards, values, where=where, variant=variant
        )
        np.testing.assert_allclose(got, want, rtol=1e-13)


def test_it_finds_the_good_arm_that_likelihood_on_the_same_data_does_not(x64):
    # Half of the logged answers are good (reward 1), half bad (0); the value is 1/2.
    rewards, values, arms = jnp.array([1.0, 0.0]), jnp.full(2, 0.5), jnp.arange(2)
    ref = jnp.log(jnp.full((2, 1), 0.5))

    def log_probs(logits):
        return jax.nn.log_softmax(logits)[arms][:, None]

    def train(loss_fn) -> float:
        tx = optax.sgd(0.5)

        def step(carry, _):
            logits, state = carry
            updates, state = tx.update(jax.grad(loss_fn)(logits), state)
            return (optax.apply_updates(logits, updates), state), None

        start = (jnp.zeros(2), tx.init(jnp.zeros(2)))
        (logits, _), _ = jax.lax.scan(step, start, length=500)
        return float(jnp.exp(log_probs(logits))[0, 0])

    def a_lol(logits):
        return ox.losses.a_lol_loss(log_probs(logits), ref, rewards, values).mean()

    assert train(a_lol) == pytest.approx(0.9957, abs=5e-5)
    assert train(lambda x: -log_probs(x).mean()) == pytest.approx(0.5)


def test_a_ratio_that_overflows_is_bounded():
    now, ref = jnp.zeros((1, 2)), jnp.full((1, 2), -1e4)
    for variant in ("sequence", "token"):
        value, grad = jax.value_and_grad(
            lambda x, variant=variant: ox.losses.a_lol_loss(
                x, ref, jnp.ones(1), jnp.zeros(1), variant=variant
            ).sum()
        )(now)
        assert value == 0
        np.testing.assert_allclose(grad, jnp.full((1, 2), -1.9), rtol=1e-6)


def test_no_gradient_flows_into_reference_rewards_or_values():
    now, *rest, where = answers(3, jnp.float32)
    for variant in VARIANTS:

        def total(*rest, variant=variant):
            return ox.losses.a_lol_loss(
                now, *rest, where=where, variant=variant, kl_beta=0.1
            ).sum()

        for grad in jax.grad(total, (0, 1, 2))(*rest):
            np.testing.assert_array_equal(grad, jnp.zeros_like(grad))


def test_parts_are_the_losses_and_the_numbers_of_tokens():
    now, *rest, where = answers(4, jnp.float32)
    losses, counts = ox.losses.a_lol_loss(now, *rest, where=where, return_parts=True)
    np.testing.assert_array_equal(losses, ox.losses.a_lol_loss(now, *rest, where=where))
    np.testing.assert_array_equal(counts, jnp.array([4.0, 3.0, 2.0, 1.0, 0.0]))


def test_bad_arguments_are_named():
    x, y = jnp.zeros((2, 3)), jnp.zeros(2)
    with pytest.raises(ValueError, match="variant must be one of"):
        ox.losses.a_lol_loss(x, x, y, y, variant="words")
    with pytest.raises(ValueError, match="clip_range must lie in"):
        ox.losses.a_lol_loss(x, x, y, y, clip_range=-0.1)
    with pytest.raises(ValueError, match="kl_beta must lie in"):
        ox.losses.a_lol_loss(x, x, y, y, kl_beta=-0.1)
    with pytest.raises(AssertionError, match="values must have one value"):
        ox.losses.a_lol_loss(x, x, y, jnp.zeros(3))
    with pytest.raises(AssertionError, match="ref_log_probs"):
        ox.losses.a_lol_loss(x, x[:1], y, y)
