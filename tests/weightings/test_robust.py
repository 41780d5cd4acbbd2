"""The running normaliser of KL-DRO."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ext as ox

rng = np.random.default_rng(0)
BATCHES = rng.gamma(2.0, 1.0, (7, 4))


def run(weighting, batches, **kwargs):
    def step(state, losses):
        weights, state = weighting.update(losses, state, **kwargs)
        return state, (weights, state)

    return jax.lax.scan(step, weighting.init(), jnp.asarray(batches))[1]


def test_the_rule_in_numpy(x64):
    t, ema = 0.6, 0.3
    weights, log_u = run(ox.compositional_kl_dro(temperature=t, ema=ema), BATCHES)
    u = None
    for i, losses in enumerate(BATCHES):
        mean = np.exp(losses / t).mean()
        u = mean if u is None else (1 - ema) * u + ema * mean
        np.testing.assert_allclose(log_u[i], np.log(u), rtol=1e-13)
        np.testing.assert_allclose(weights[i], np.exp(losses / t) / u, rtol=1e-13)


def test_without_memory_the_weights_are_those_of_the_batch(x64):
    weights, _ = run(ox.compositional_kl_dro(temperature=0.5, ema=1.0), BATCHES)
    for got, losses in zip(weights, jnp.asarray(BATCHES), strict=True):
        want = ox.losses.kl_dro_weights(losses, temperature=0.5)
        np.testing.assert_allclose(got, want, rtol=1e-13)


def test_equal_losses_weigh_one_for_ever():
    weights, _ = run(ox.compositional_kl_dro(), np.full((5, 3), 2.0, np.float32))
    np.testing.assert_allclose(weights, np.ones((5, 3)), rtol=1e-6)


def test_more_memory_means_less_bias_of_the_gradient(x64):
    # E[l] = 1 or 3 for two kinds of example, of which small batches see a few. The
    # gradient of T log E exp(l/T) with respect to the log of the second kind's losses
    # is its weight, here the expectation of the weighted share.
    losses = np.where(rng.random((20_000, 2)) < 0.2, 3.0, 1.0)
    share = 0.2 * np.exp(3.0) / (0.2 * np.exp(3.0) + 0.8 * np.exp(1.0))

    def bias(ema):
        weights, _ = run(ox.compositional_kl_dro(ema=ema), losses)
        late = slice(2_000, None)
        return abs(np.mean(np.where(losses == 3.0, weights, 0)[late]) - share)

    alone, short, long = bias(1.0), bias(0.1), bias(0.01)
    assert long < 0.02 < short < alone / 2


def test_masked_examples_are_not_there(x64):
    where = jnp.array([True, False, True, True])
    weighting = ox.compositional_kl_dro(ema=0.4)
    masked, log_u = run(weighting, BATCHES, where=where)
    sliced, want = run(weighting, BATCHES[:, np.asarray(where)])
    np.testing.assert_allclose(masked[:, where], sliced, rtol=1e-13)
    np.testing.assert_array_equal(masked[:, 1], 0)
    np.testing.assert_allclose(log_u, want, rtol=1e-13)


def test_a_batch_of_which_nothing_counts_changes_nothing():
    weighting = ox.compositional_kl_dro()
    none = jnp.zeros(4, bool)
    for state in (weighting.init(), jnp.float32(0.3)):
        weights, after = weighting.update(jnp.ones(4), state, where=none)
        np.testing.assert_array_equal(weights, np.zeros(4))
        assert after == state


def test_huge_losses_do_not_overflow():
    weighting = ox.compositional_kl_dro()
    state = weighting.init()
    for losses in ([1e4, 0.0], [-1e4, 1.0], [1e4, -1e4]):
        weights, state = weighting.update(jnp.array(losses), state)
        assert jnp.isfinite(weights).all()
        assert jnp.isfinite(state)


def test_weights_are_constants():
    weighting = ox.compositional_kl_dro()

    def total(losses):
        weights, _ = weighting.update(losses, weighting.init())
        return jnp.sum(weights * losses), weights

    gradient, weights = jax.grad(total, has_aux=True)(jnp.array([1.0, 2.0]))
    np.testing.assert_array_equal(gradient, weights)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_short_floats_give_float32_and_leave_the_state_alone(dtype):
    weighting = ox.compositional_kl_dro()
    state = weighting.init()
    weights, after = weighting.update(jnp.ones(3, dtype), state)
    assert weights.dtype == jnp.float32
    assert (after.dtype, after.shape, after.weak_type) == (state.dtype, (), False)


def test_hyperparameters_outside_their_range_are_named():
    with pytest.raises(ValueError, match="compositional_kl_dro: ema must lie in"):
        ox.compositional_kl_dro(ema=0.0)
    with pytest.raises(ValueError, match="compositional_kl_dro: temperature"):
        ox.compositional_kl_dro(temperature=0.0)
    with pytest.raises(AssertionError, match="losses must be a vector"):
        ox.compositional_kl_dro().update(jnp.ones((2, 2)), jnp.float32(0.0))
