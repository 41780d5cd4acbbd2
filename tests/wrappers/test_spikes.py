"""`skip_spikes`: outliers are left out, and remembered."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox

PARAMS = {"w": jnp.zeros((2, 2))}


def gradient(norm):
    return {"w": jnp.full((2, 2), norm / 2, jnp.float32)}


def run(tx, norms, **extra):
    """Norm of each update, and the states."""
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    sizes, states = [], []
    for norm in norms:
        updates, state = update(gradient(norm), state, PARAMS, **extra)
        sizes.append(float(jnp.linalg.norm(updates["w"])))
        states.append(state)
    return sizes, states


def normal_norms(n, std=0.2, seed=0):
    return np.exp(std * np.random.default_rng(seed).normal(size=n))


def test_a_spike_is_skipped_and_the_inner_state_untouched():
    tx = ox.skip_spikes(optax.trace(0.9), warmup_steps=20)
    sizes, states = run(tx, [*normal_norms(40), 50.0, 1.0])
    assert sizes[40] == 0
    jax.tree.map(
        np.testing.assert_array_equal, states[40].inner_state, states[39].inner_state
    )
    assert states[40].last_skipped
    assert sizes[41] > 0
    assert not states[41].last_skipped
    assert [int(s.total_skipped) for s in states[39:]] == [0, 1, 1]


def test_without_spikes_it_is_the_inner_link():
    norms = normal_norms(200)
    got, states = run(ox.skip_spikes(optax.trace(0.9)), norms)
    want, _ = run(optax.trace(0.9), norms)
    np.testing.assert_array_equal(got, want)
    assert states[-1].total_skipped == 0


def test_the_statistics_are_those_of_the_log_norm():
    """Equal weights 1/t until 1/t < 1 - decay, then those of an exponential average."""
    y = np.log(normal_norms(30))
    _, states = run(ox.skip_spikes(optax.identity(), warmup_steps=100), np.exp(y))
    np.testing.assert_allclose(states[-1].mean, y.mean(), atol=1e-6)
    np.testing.assert_allclose(states[-1].variance, y.var(), rtol=1e-4)
    _, states = run(ox.skip_spikes(optax.identity(), decay=0.8), np.exp(y))
    mean, var = 0.0, 0.0
    for t, value in enumerate(y, 1):
        weight, delta = max(0.2, 1 / t), value - mean
        mean, var = mean + weight * delta, (1 - weight) * (var + weight * delta**2)
    np.testing.assert_allclose(states[-1].mean, mean, atol=1e-6)
    np.testing.assert_allclose(states[-1].variance, var, rtol=1e-4)


def test_a_spike_enters_the_statistics_clipped_to_the_threshold():
    tx = ox.skip_spikes(optax.identity(), 4.0, 0.9, warmup_steps=10)
    _, states = run(tx, [*normal_norms(20), 1e20])
    before, after = states[-2:]
    bound = 4 * max(float(jnp.sqrt(before.variance)), 0.1)
    np.testing.assert_allclose(after.mean - before.mean, 0.1 * bound, rtol=1e-5)
    assert after.count == before.count + 1


def test_it_is_nothing_during_warmup():
    tx = ox.skip_spikes(optax.identity(), warmup_steps=10)
    sizes, _ = run(tx, [1.0] * 9 + [100.0])
    assert sizes[-1] > 0


def test_threshold_and_min_std_say_where_a_spike_begins():
    def skips(factor, **options):
        tx = ox.skip_spikes(optax.identity(), warmup_steps=5, **options)
        return run(tx, [2.0] * 10 + [2.0 * factor])[0][-1] == 0

    edge = np.exp(0.5)  # 5 standard deviations of 0.1, as all norms are equal
    assert not skips(0.99 * edge)
    assert skips(1.01 * edge)
    assert skips(0.99 * edge, threshold=4.0)
    assert not skips(1.01 * edge, min_std=0.2)
    assert not skips(1e-6)  # small gradients are no spikes


def test_a_level_shift_is_accepted_after_the_most_skips_in_a_row():
    tx = ox.skip_spikes(optax.identity(), warmup_steps=10, max_consecutive_skips=3)
    sizes, states = run(tx, [*normal_norms(20), *(1e6 * normal_norms(8, seed=1))])
    assert [size == 0 for size in sizes[20:]] == [True] * 3 + [False] * 5
    assert [int(s.consecutive_skips) for s in states[20:24]] == [1, 2, 3, 0]
    np.testing.assert_allclose(states[23].mean, np.log(sizes[23]), rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_skipped_and_never_enters(bad):
    tx = ox.skip_spikes(optax.trace(0.9), warmup_steps=2, max_consecutive_skips=1)
    sizes, states = run(tx, [bad, 1.0, 1.0, 1.0, 99.0, bad, bad, 99.0])
    assert [size == 0 for size in sizes] == [1, 0, 0, 0, 1, 1, 1, 0]
    assert states[0].count == 0
    for got, want in ((states[0], tx.init(PARAMS)), (states[6], states[4])):
        for name in ("mean", "variance", "consecutive_skips", "inner_state"):
            jax.tree.map(
                np.testing.assert_array_equal, getattr(got, name), getattr(want, name)
            )
    assert int(states[-1].total_notfinite) == 3
    assert int(states[-1].total_skipped) == 4


def test_zero_gradients_pass_and_do_not_enter():
    _, states = run(ox.skip_spikes(optax.identity()), [1.0, 0.0, 0.0, 2.0])
    assert [int(s.count) for s in states] == [1, 1, 1, 2]
    assert states[-1].total_skipped == 0
    np.testing.assert_allclose(states[-1].mean, np.log(2) / 2, rtol=1e-6)


def test_huge_finite_gradients_are_measured():
    _, states = run(ox.skip_spikes(optax.identity()), [1e30])
    np.testing.assert_allclose(states[-1].mean, 30 * np.log(10), rtol=1e-6)


def test_the_loss_may_be_measured_instead():
    tx = ox.skip_spikes(optax.identity(), warmup_steps=3, measure="value", min_std=0.2)
    state, taken = tx.init(PARAMS), []
    for value in (-1.0, -1.1, -0.9, -1.0, 5.0, jnp.nan, -1.0):
        updates, state = tx.update(gradient(1.0), state, PARAMS, value=value)
        taken.append(bool(updates["w"].any()))
    assert taken == [True] * 4 + [False, False, True]
    updates, state = tx.update(gradient(np.nan), state, PARAMS, value=-1.0)
    assert not updates["w"].any()
    with pytest.raises(
        ValueError, match="skip_spikes needs the extra argument 'value'"
    ):
        tx.update(gradient(1.0), state, PARAMS)


def test_the_statistics_can_be_read_from_any_chain():
    guarded = ox.skip_spikes(optax.identity())
    tx = optax.chain(optax.clip(1e9), guarded)
    _, states = run(tx, [1.0, np.e, np.nan])
    got = ox.spike_statistics(states[-1])
    assert {k: float(v) for k, v in got.items()} == pytest.approx(
        {
            "mean": 0.5,
            "std": 0.5,
            "last_skipped": 1,
            "consecutive_skips": 0,
            "total_skipped": 1,
            "total_notfinite": 1,
        }
    )
    for tx, n in ((optax.identity(), 0), (optax.chain(guarded, guarded), 2)):
        with pytest.raises(ValueError, match=f"{n} SkipSpikesStates"):
            ox.spike_statistics(tx.init(PARAMS))


def test_hyperparameters_may_be_traced():
    def skipped(threshold):
        tx = ox.skip_spikes(optax.identity(), threshold, warmup_steps=1)
        state = tx.init(PARAMS)
        for norm in (1.0, 1.0, 2.0):
            _, state = tx.update(gradient(norm), state)
        return state.total_skipped

    got = jax.vmap(skipped)(jnp.asarray([5.0, 8.0]))  # log 2 = 6.9 * 0.1
    assert got.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.0}, "threshold"),
        ({"decay": 1.0}, "decay"),
        ({"min_std": -0.1}, "min_std"),
        ({"warmup_steps": 0}, "warmup_steps"),
        ({"max_consecutive_skips": 0}, "max_consecutive_skips"),
        ({"measure": "loss"}, "measure must be one of 'grad_norm', 'value'"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=f"skip_spikes: {message}"):
        ox.skip_spikes(optax.identity(), **options)
