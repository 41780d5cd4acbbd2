"""Second-order clipping: the division, `sophia`, its win rate and its toy."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox


def random_steps(shape=(4, 5), steps=12, seed=0, dtype=jnp.float32):
    """Gradients and signed curvatures, some exactly zero."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        g = rng.normal(size=shape) * (rng.random(shape) < 0.8)
        h = rng.normal(size=shape) * (rng.random(shape) < 0.8)
        yield jnp.asarray(g, dtype), jnp.asarray(h, dtype)


def sophia_link(**options):
    return ox.scale_by_sophia(estimator=ox.external_hessian_diag(), **options)


# The division -------------------------------------------------------------------------


def test_updates_are_divided_by_the_averaged_curvature_with_a_floor():
    tx = ox.precondition_by_hessian_diag(
        ox.external_hessian_diag(), b2=0.5, gamma=2.0, eps=0.25, update_interval=1
    )
    u = jnp.array([1.0, 1.0, 1.0, 0.0])
    h = jnp.array([8.0, -8.0, 0.0, 8.0])
    out, state = tx.update(u, tx.init(u), u, hessian_diag=h)
    np.testing.assert_array_equal(out, [1 / 8, 4.0, 4.0, 0.0])  # gamma * h / 2
    out, _ = tx.update(u, state, u, hessian_diag=h)
    np.testing.assert_array_equal(out, np.float32([1 / 12, 4, 4, 0]))  # 3/4 gamma h


def test_curvature_is_refreshed_before_it_is_used():
    # Refreshed afterwards, the first step would be u / eps.
    tx = ox.precondition_by_hessian_diag(ox.external_hessian_diag(), b2=0.0)
    u = jnp.ones(2)
    out, _ = tx.update(u, tx.init(u), u, hessian_diag=4 * u)
    np.testing.assert_array_equal(out, [0.25, 0.25])


# Sophia -------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [1.0, 0.25, None], ids=str)
def test_it_is_the_chain_of_average_division_and_clip(clip, x64):
    rates = {"b2": 0.9, "gamma": 0.3, "eps": 1e-3, "update_interval": 3}
    tx = sophia_link(b1=0.9, clip_threshold=clip, **rates)
    chain = optax.chain(
        optax.ema(0.9, debias=False),
        ox.precondition_by_hessian_diag(ox.external_hessian_diag(), **rates),
        optax.identity() if clip is None else optax.clip(clip),
    )
    x = jnp.zeros((4, 5))
    a, b = tx.init(x), chain.init(x)
    ours, theirs = jax.jit(tx.update), jax.jit(chain.update)
    for g, h in random_steps(dtype=jnp.float64):
        u, a = ours(g, a, x, hessian_diag=h)
        v, b = theirs(g, b, x, hessian_diag=h)
        np.testing.assert_allclose(u, v, rtol=1e-12, atol=1e-13)


def test_without_averages_and_clip_it_is_newtons_step():
    tx = sophia_link(b1=0.0, b2=0.0, gamma=1.0, clip_threshold=None)
    x, h = jnp.array([3.0, -5.0]), jnp.array([1.0, 4.0])
    u, _ = tx.update(h * x, tx.init(x), x, hessian_diag=h)
    np.testing.assert_array_equal(x - u, [0.0, 0.0])


def test_newtons_step_with_the_hessian_of_the_loss_itself():
    tx = ox.scale_by_sophia(
        b1=0.0, b2=0.0, gamma=1.0, clip_threshold=None, estimator=ox.hutchinson_diag()
    )
    x = jnp.array([3.0, -5.0])

    def value_fn(x):
        return jnp.sum(jnp.array([1.0, 4.0]) * (x - 2) ** 2) / 2

    u, _ = tx.update(jax.grad(value_fn)(x), tx.init(x), x, value_fn=value_fn)
    np.testing.assert_allclose(x - u, [2.0, 2.0], rtol=1e-6)


@pytest.mark.parametrize("c", [1.0, 0.25])
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30], ids=["plain", "huge", "tiny"])
def test_no_entry_steps_further_than_the_threshold(c, scale):
    tx = sophia_link(clip_threshold=c, update_interval=2)
    x = jnp.zeros((4, 5))
    state, update = tx.init(x), jax.jit(tx.update)
    for g, h in random_steps():
        u, state = update(g * jnp.float32(scale), state, x, hessian_diag=h)
        assert (jnp.abs(u) <= c).all()


def test_where_curvature_is_not_positive_it_is_a_sign_step():
    tx = sophia_link(clip_threshold=0.5, update_interval=1)
    g = jnp.array([1e-3, -1e-3, 0.0, 1e-3])
    u, _ = tx.update(g, tx.init(g), g, hessian_diag=jnp.array([-1.0, 0.0, -1.0, 1e9]))
    np.testing.assert_array_equal(u[:3], [0.5, -0.5, 0.0])
    assert 0 < u[3] < 1e-8


def test_no_bias_is_corrected():
    tx = sophia_link(b1=0.75, b2=0.5, gamma=1.0, clip_threshold=None)
    g, h = jnp.array([4.0]), jnp.array([8.0])
    u, state = tx.update(g, tx.init(g), g, hessian_diag=h)
    np.testing.assert_array_equal(u, [(0.25 * 4) / (0.5 * 8)])
    assert optax.tree.get(state, "mu") == 1.0
    assert optax.tree.get(state, "hessian") == 4.0


def test_between_refreshes_curvature_is_kept_and_momentum_is_not():
    tx = sophia_link(b1=0.5, b2=0.0, gamma=1.0, clip_threshold=None, update_interval=2)
    one = jnp.ones(1)
    state, seen, update = tx.init(one), [], jax.jit(tx.update)
    for h in (2.0, 64.0, 4.0):
        u, state = update(one, state, one, hessian_diag=h * one)
        seen.append(float(u[0]))
    assert seen == [0.5 / 2, 0.75 / 2, 0.875 / 4]


def test_the_optimizer_adds_decay_and_the_learning_rate():
    options: dict[str, Any] = {"b1": 0.9, "gamma": 0.3, "update_interval": 2}
    tx = ox.sophia(
        0.1, weight_decay=0.5, estimator=ox.external_hessian_diag(), **options
    )
    link = sophia_link(**options)
    x = jnp.linspace(-1.0, 1.0, 20).reshape(4, 5)
    a, b = tx.init(x), link.init(x)
    whole, bare = jax.jit(tx.update), jax.jit(link.update)
    for g, h in random_steps(steps=4):
        updates, a = whole(g, a, x, hessian_diag=h)
        u, b = bare(g, b, x, hessian_diag=h)
        np.testing.assert_allclose(updates, -0.1 * (u + 0.5 * x), rtol=1e-6, atol=1e-9)


def test_the_default_estimator_is_gaussian_hutchinson():
    x = jnp.linspace(1.0, 2.0, 6)
    given = ox.scale_by_sophia(estimator=ox.hutchinson_diag(probe="gaussian"))
    default = ox.scale_by_sophia()

    def value_fn(x):
        return jnp.sum(x**4)

    def curvature(tx):
        step = jax.jit(lambda s: tx.update(x, s, x, value_fn=value_fn)[1])
        return optax.tree.get(step(tx.init(x)), "hessian")

    np.testing.assert_array_equal(curvature(default), curvature(given))


def test_the_momentum_is_kept_in_mu_dtype():
    x = jnp.ones(2, jnp.bfloat16)
    assert sophia_link().init(x).mu.dtype == jnp.float32
    state = sophia_link(mu_dtype=jnp.bfloat16).init(x)
    assert state.mu.dtype == jnp.bfloat16
    assert optax.tree.get(state, "hessian").dtype == jnp.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"b1": 1.0}, "scale_by_sophia: b1 must lie in"),
        ({"b2": -0.1}, "decay must lie in|b2 must lie in"),
        ({"eps": 0.0}, r"scale_by_sophia: eps must lie in \(0.0"),
        ({"gamma": -1.0}, "scale_by_sophia: gamma must lie in"),
        ({"clip_threshold": 0.0}, r"scale_by_sophia: clip_threshold must lie in \(0.0"),
        ({"update_interval": 0}, "update_interval must be an integer"),
    ],
)
def test_arguments_outside_their_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        sophia_link(**options)


def test_what_the_estimator_needs_is_asked_for_by_name():
    x = jnp.ones(2)
    for estimator, name in (
        (None, "value_fn"),
        (ox.gauss_newton_bartlett_diag(), "logits_fn"),
        (ox.external_hessian_diag(), "hessian_diag"),
    ):
        tx = ox.sophia(0.1, estimator=estimator)
        with pytest.raises(ValueError, match=f"needs the extra argument '{name}'"):
            tx.update(x, tx.init(x), x)


# Win rate -----------------------------------------------------------------------------

# Leaves of 4 and 2 entries; 1 and 2 of their quotients are below 1.
PARAMS = {"a": jnp.zeros(4), "b": jnp.zeros(2)}
GRADS = {"a": jnp.array([1.0, 4.0, -4.0, 2.0]), "b": jnp.array([1.0, -0.5])}
CURVATURE = {"a": jnp.array([2.0, 2.0, 2.0, 2.0]), "b": jnp.array([2.0, 2.0])}


def after_one_step(tx):
    update = jax.jit(tx.update)
    return update(GRADS, tx.init(PARAMS), PARAMS, hessian_diag=CURVATURE)[1]


def one_step(**options):
    return sophia_link(b1=0.0, b2=0.0, gamma=1.0, **options)


def test_the_win_rate_is_the_fraction_of_entries_below_1():
    state = after_one_step(one_step())
    assert (state.win_rate["a"], state.win_rate["b"]) == (0.25, 1.0)
    np.testing.assert_array_equal(ox.sophia_win_rate(state), 3 / 6)


def test_an_entry_at_exactly_1_has_not_won():
    # 2 / 2 of leaf a is such an entry, so 1 of 4 and not 2 of 4.
    assert after_one_step(one_step()).win_rate["a"] == 0.25


def test_leaves_count_by_their_size_also_in_buckets():
    more = {"c": jnp.zeros(4)}
    grads = GRADS | {"c": jnp.array([1.0, 1.0, 1.0, 9.0])}
    h = CURVATURE | {"c": jnp.full(4, 2.0)}
    for tx in (one_step(), ox.bucketed(one_step())):
        state = tx.init(PARAMS | more)
        _, state = jax.jit(tx.update)(grads, state, PARAMS | more, hessian_diag=h)
        np.testing.assert_allclose(ox.sophia_win_rate(state), (1 + 2 + 3) / 10)


def test_the_win_rate_is_found_inside_chains_and_masks():
    tx = optax.masked(one_step(), {"a": True, "b": False})
    tx = optax.chain(optax.identity(), tx)
    np.testing.assert_array_equal(ox.sophia_win_rate(after_one_step(tx)), 0.25)
    with jax.numpy_dtype_promotion("strict"):
        found = jax.jit(ox.sophia_win_rate)(after_one_step(tx))
    np.testing.assert_array_equal(found, 0.25)


def test_the_win_rate_of_no_entries_is_0():
    for params in ({}, {"a": jnp.zeros((0, 3))}):
        rate = ox.sophia_win_rate(ox.scale_by_sophia().init(params))
        assert float(rate) == 0.0


def test_no_state_or_several_are_an_error():
    with pytest.raises(ValueError, match="expected one SophiaState, found 0"):
        ox.sophia_win_rate(optax.adam(0.1).init(PARAMS))
    two = (one_step().init(PARAMS), one_step().init(PARAMS))
    with pytest.raises(ValueError, match="expected one SophiaState, found 2"):
        ox.sophia_win_rate(two)


# The toy ------------------------------------------------------------------------------


def toy(p):
    x, y = p
    return 8 * (x - 1) ** 2 * (1.3 * x**2 + 2 * x + 1) + (y - 4) ** 2 / 2


def newton(rate):
    def update(updates, state, params=None, **extra):
        return -rate * updates / extra["hessian_diag"], state

    return optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)


TOY = {
    "sophia": lambda rate: ox.sophia(
        rate,
        b1=0.0,
        b2=0.0,
        gamma=1.0,
        weight_decay=0.0,
        update_interval=1,
        estimator=ox.external_hessian_diag(),
    ),
    "adam": lambda rate: optax.adam(rate, 0.9, 0.95),
    "sign descent": lambda rate: optax.chain(
        optax.scale_by_sign(), optax.scale_by_learning_rate(rate)
    ),
    "gradient descent": optax.sgd,
    "newton": newton,
}


def steps_on_the_toy(make, steps=400):
    """Steps until both coordinates stay within 0.02, at the best of 80 rates."""
    gradient = jax.grad(toy)

    def run(rate):
        tx = optax.with_extra_args_support(make(rate))

        def step(carry, _):
            p, state = carry
            h = jnp.diag(jax.hessian(toy)(p))
            updates, state = tx.update(gradient(p), state, p, hessian_diag=h)
            p = optax.apply_updates(p, updates)
            return (p, state), jnp.abs(p - jnp.array([1.0, 4.0])).max() < 0.02

        start = jnp.array([0.15, 0.0])
        return jax.lax.scan(step, (start, tx.init(start)), length=steps)[1]

    near = np.asarray(jax.jit(jax.vmap(run))(jnp.logspace(-3, 0, 80)))
    stays = np.logical_and.accumulate(near[:, ::-1], axis=1)[:, ::-1]
    first = np.where(stays.any(axis=1), stays.argmax(axis=1) + 1, np.inf)
    return first.min()


def test_the_toy_of_the_paper_takes_4_steps_and_others_many():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        steps = {name: steps_on_the_toy(make) for name, make in TOY.items()}
    # The specification's table; its 93 steps of Adam need a looser criterion than the
    # one that gives all other numbers, which finds 106.
    assert steps["sophia"] == 4
    assert steps["sign descent"] == 157
    assert steps["gradient descent"] == 189
    assert steps["newton"] == np.inf
    assert 90 <= steps["adam"] <= 110
