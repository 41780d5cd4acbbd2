"""Weightings by loss: behind a warm-up, and with a table of examples."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox

rng = np.random.default_rng(0)
LOSSES = jnp.asarray(rng.gamma(2.0, 1.0, (4, 5)), jnp.float32)
WHERE = jnp.array([True, True, False, True, False])


@pytest.mark.parametrize("strategy", ["linupper", "quadratic", "extremes", "uniform"])
def test_after_the_warm_up_the_weights_are_those_of_the_batch(strategy):
    kwargs = {"strategy": strategy, "delta": 1.5, "temperature": 0.4}
    weighting = ox.loss_based_reweighting(**kwargs, warmup_steps=2)

    def step(state, losses):
        weights, state = weighting.update(losses, state, where=WHERE)
        return state, weights

    state, weights = jax.lax.scan(step, weighting.init(), LOSSES)
    equal = np.asarray(WHERE) / 3
    np.testing.assert_allclose(weights[:2], [equal] * 2, rtol=1e-6)
    for got, losses in zip(weights[2:], LOSSES[2:], strict=True):
        want = ox.losses.loss_based_weights(losses, where=WHERE, **kwargs)
        np.testing.assert_allclose(got, want, rtol=1e-6)
    assert state.count == 4


def test_the_temperature_may_be_a_schedule():
    weighting = ox.loss_based_reweighting(
        temperature=optax.piecewise_constant_schedule(1.0, {2: 0.5})
    )
    state = weighting.init()
    for t, losses in enumerate(LOSSES):
        weights, state = jax.jit(weighting.update)(losses, state)
        want = ox.losses.loss_based_weights(losses, temperature=1.0 if t < 2 else 0.5)
        np.testing.assert_allclose(weights, want, rtol=1e-6)


def test_reweighting_refuses_what_is_outside_its_range():
    with pytest.raises(ValueError, match="loss_based_reweighting: strategy"):
        ox.loss_based_reweighting(strategy="upper")
    with pytest.raises(ValueError, match="loss_based_reweighting: warmup_steps"):
        ox.loss_based_reweighting(warmup_steps=-1)
    with pytest.raises(ValueError, match="loss_based_reweighting: temperature"):
        ox.loss_based_reweighting(temperature=0.0)
    with pytest.raises(ValueError, match="loss_based_reweighting: delta"):
        ox.loss_based_reweighting(delta=-1.0)


def visits(seed, steps=9, num_examples=6, batch=3):
    draw = np.random.default_rng(seed)
    index = np.stack([draw.permutation(num_examples)[:batch] for _ in range(steps)])
    losses, consistency = draw.gamma(1.0, 1.0, (2, steps, batch))
    return jnp.asarray(losses), jnp.asarray(consistency), jnp.asarray(index)


def run(weighting, losses, consistency, index):
    def step(state, inputs):
        l, rho, i = inputs
        weights, state = weighting.update(l, state, consistency_losses=rho, index=i)
        return state, weights

    return jax.lax.scan(step, weighting.init(), (losses, consistency, index))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("eta", "lam"), [(1.0, 1.0), (8.0, 2.0)])
def test_any_history_is_a_sigmoid_of_its_sum(eta, lam):
    losses, consistency, index = visits(0)
    weighting = ox.adaptive_consistency_weighting(
        6, learning_rate=eta, consistency_weight=lam
    )
    state, weights = run(weighting, losses, consistency, index)
    sums = np.zeros(6)
    for t in range(len(index)):
        sums[index[t]] += eta * (losses[t] - lam * consistency[t])
        want = jax.nn.sigmoid(sums[index[t]])
        # Sums of 100 are stored as the share 1e-43 of one.
        np.testing.assert_allclose(weights[t, :, 0], want, rtol=1e-9)
        np.testing.assert_allclose(weights[t].sum(-1), np.ones(3), rtol=1e-14)
    np.testing.assert_allclose(state.weights[:, 0], jax.nn.sigmoid(sums), rtol=1e-9)


def test_rows_that_were_not_visited_are_untouched():
    weighting = ox.adaptive_consistency_weighting(5)
    _, state = weighting.update(
        jnp.array([3.0, 1.0]),
        weighting.init(),
        consistency_losses=jnp.zeros(2),
        index=jnp.array([4, 1]),
    )
    np.testing.assert_array_equal(state.weights[jnp.array([0, 2, 3])], 0.5)
    assert (state.weights[jnp.array([4, 1]), 0] > 0.7).all()


def test_equal_losses_change_nothing():
    weighting = ox.adaptive_consistency_weighting(3, learning_rate=5.0)
    weights, state = weighting.update(
        jnp.array([2.0]),
        weighting.init(),
        consistency_losses=jnp.array([2.0]),
        index=jnp.array([0]),
    )
    np.testing.assert_array_equal(weights, [[0.5, 0.5]])
    np.testing.assert_array_equal(state.weights, np.full((3, 2), 0.5))


def test_a_weight_that_underflowed_stays_zero_and_huge_losses_are_finite():
    weighting = ox.adaptive_consistency_weighting(1)
    index, state = jnp.array([0]), weighting.init()
    for loss, consistency in ((1e4, 0.0), (0.0, 1e4), (-1e4, 1e4)):
        weights, state = weighting.update(
            jnp.array([loss]),
            state,
            consistency_losses=jnp.array([consistency]),
            index=index,
        )
        np.testing.assert_array_equal(weights, [[1.0, 0.0]])


def test_a_row_of_zeros_starts_again():
    weighting = ox.adaptive_consistency_weighting(1)
    state = weighting.init()._replace(weights=jnp.zeros((1, 2)))
    weights, _ = weighting.update(
        jnp.log(jnp.array([3.0])),
        state,
        consistency_losses=jnp.zeros(1),
        index=jnp.array([0]),
    )
    np.testing.assert_allclose(weights, [[0.75, 0.25]], rtol=1e-6)


def test_neither_loss_gets_a_gradient_through_the_weights():
    weighting = ox.adaptive_consistency_weighting(2)

    def total(l, rho):
        weights, _ = weighting.update(
            l, weighting.init(), consistency_losses=rho, index=jnp.array([0, 1])
        )
        return jnp.sum(weights * jnp.stack([l, rho], -1)), weights

    l, rho = jnp.array([1.0, 2.0]), jnp.array([0.5, 3.0])
    gradients, weights = jax.grad(total, argnums=(0, 1), has_aux=True)(l, rho)
    np.testing.assert_array_equal(jnp.stack(gradients, -1), weights)


def test_states_keep_their_dtype_and_do_not_recompile():
    weighting = ox.adaptive_consistency_weighting(4)
    traces = []

    @jax.jit
    def update(*arguments, **extra):
        traces.append(1)
        return weighting.update(*arguments, **extra)

    state = weighting.init()
    for _ in range(2):
        weights, new = update(
            jnp.ones(2, "bfloat16"),
            state,
            consistency_losses=jnp.zeros(2, "bfloat16"),
            index=jnp.array([1, 2]),
        )
        assert weights.dtype == new.weights.dtype == state.weights.dtype == jnp.float32
        state = new
    assert len(traces) == 1


def test_what_does_not_fit_is_named():
    weighting = ox.adaptive_consistency_weighting(4)
    state, l, index = weighting.init(), jnp.ones(2), jnp.array([0, 1])
    with pytest.raises(AssertionError, match="losses must be a vector"):
        weighting.update(l[None], state, consistency_losses=l, index=index)
    with pytest.raises(AssertionError, match="losses, consistency_losses, index"):
        weighting.update(l, state, consistency_losses=l, index=index[:1])
    with pytest.raises(AssertionError, match="index must be integers"):
        weighting.update(l, state, consistency_losses=l, index=l)
    with pytest.raises(ValueError, match="num_examples must be an integer of 1"):
        ox.adaptive_consistency_weighting(0)
    with pytest.raises(ValueError, match="consistency_weight must lie in"):
        ox.adaptive_consistency_weighting(2, consistency_weight=-1.0)
