"""`reset_state_every`, `refactorize` and `refactorize_every`."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_ext as ox

ADAM = ox.full_precision(optax.adam(0.1))


def feed(tx, grads, x=None):
    x = jnp.ones(4) if x is None else x
    state, outs = tx.init(x), []
    update = jax.jit(tx.update)
    for g in grads:
        out, state = update(g, state, x)
        outs.append(out)
    return np.asarray(outs)


def noise(steps, shape=(4,), seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(steps)]


# reset_state_every --------------------------------------------------------------------


def test_each_period_is_that_of_a_fresh_optimizer():
    grads = noise(11)
    got = feed(ox.reset_state_every(ADAM, period=4), grads)
    want = [feed(ADAM, grads[a : a + 4]) for a in (0, 4, 8)]
    np.testing.assert_array_equal(got, np.concatenate(want))


def test_a_period_beyond_the_run_is_inner():
    grads = noise(6)
    got = feed(ox.reset_state_every(ADAM, period=7), grads)
    np.testing.assert_array_equal(got, feed(ADAM, grads))


def test_named_fields_are_reset_wherever_they_are_and_others_stay():
    inner = optax.chain(ADAM, optax.trace(0.5))
    grads = noise(5)
    tx = ox.reset_state_every(inner, period=3, which=("mu",))
    state, plain = tx.init(jnp.ones(4)), inner.init(jnp.ones(4))
    for t, g in enumerate(grads):
        if t == 3:
            plain = optax.tree.set(plain, mu=jnp.zeros(4))
        got, state = tx.update(g, state, jnp.ones(4))
        want, plain = inner.update(g, plain, jnp.ones(4))
        np.testing.assert_array_equal(got, want)
    jax.tree.map(np.testing.assert_array_equal, state.inner_state, plain)


@pytest.mark.parametrize(
    ("which", "factor"),
    # The step after: the mean starts at (1 - b1) g; without nu the root does so too.
    [(("mu",), 0.1), (("mu", "nu"), 0.1 / np.sqrt(0.001)), (None, 1.0)],
)
def test_the_step_after_a_reset_has_the_documented_size(which, factor):
    # After 4000 steps b2^t is 0.018: bias corrections of mu and nu are near 1.
    tx = ox.reset_state_every(ADAM, period=4000, which=which)
    x = g = jnp.ones(1)

    def step(state, _):
        out, state = tx.update(g, state, x)
        return state, out

    outs = jax.lax.scan(step, tx.init(x), length=4001)[1]
    np.testing.assert_allclose(outs[-2], [-0.1], rtol=1e-4)
    np.testing.assert_allclose(outs[-1], [-0.1 * factor], rtol=0.01)


def test_init_sees_the_present_parameters():
    class Start(NamedTuple):
        x: jax.Array

    inner = optax.GradientTransformation(
        lambda x: Start(jnp.array(x)), lambda g, state, x: (state.x, state)
    )
    tx = ox.reset_state_every(inner, period=1)
    state = tx.init(jnp.zeros(1))
    assert tx.update(jnp.ones(1), state, jnp.full(1, 5.0))[0] == 0
    state = state._replace(count=jnp.int32(1))
    assert tx.update(jnp.ones(1), state, jnp.full(1, 5.0))[0] == 5


@pytest.mark.parametrize("which", ["mu", (), ("mu", 1), ["mu"]])
def test_names_must_come_as_a_tuple(which):
    with pytest.raises(ValueError, match="which must be None or a tuple of field"):
        ox.reset_state_every(ADAM, which=which)


def test_an_unknown_field_is_named_with_those_that_there_are():
    tx = ox.reset_state_every(optax.chain(ADAM, optax.trace(0.9)), which=("nn",))
    with pytest.raises(ValueError, match="no field 'nn'; it has count, mu, nu, trace"):
        tx.init(jnp.ones(1))


def test_fields_of_an_empty_tree_are_known():
    assert ox.reset_state_every(ADAM, which=("mu", "nu")).init({}).count == 0


def test_a_period_below_1_and_missing_parameters_are_named():
    with pytest.raises(ValueError, match="reset_state_every: period must be an int"):
        ox.reset_state_every(ADAM, period=0)
    tx = ox.reset_state_every(ADAM)
    with pytest.raises(ValueError, match="reset_state_every needs the parameters"):
        tx.update(jnp.ones(1), tx.init(jnp.ones(1)))


# refactorize --------------------------------------------------------------------------


def factors(m, r, n, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(m, r))), jnp.asarray(rng.normal(size=(r, n)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [(6, 3, 5), (3, 3, 8), (4, 1, 1), (1, 1, 1)])
def test_the_product_stays_and_the_factors_are_balanced(shape):
    left, right = factors(*shape)
    a, b = ox.refactorize(left, right)
    assert (a.shape, b.shape) == (left.shape, right.shape)
    s = np.linalg.svd(left @ right, compute_uv=False)[: shape[1]]
    # Some ten roundings, relative to the largest singular value (about 10).
    close = {"rtol": 0, "atol": 2e-14 * max(s[0], 1)}
    np.testing.assert_allclose(a @ b, left @ right, **close)
    np.testing.assert_allclose(a.T @ a, np.diag(s), **close)
    np.testing.assert_allclose(b @ b.T, np.diag(s), **close)
    largest = np.take_along_axis(a, np.argmax(np.abs(a), axis=0)[None], 0)
    assert (largest > 0).all()
    again = ox.refactorize(a, b)
    np.testing.assert_allclose(again[0], a, **close)
    np.testing.assert_allclose(again[1], b, **close)


def test_signs_of_the_factors_do_not_matter():
    left, right = factors(6, 3, 5)
    flip = jnp.array([[1.0, -1.0, -1.0]])
    for got, want in zip(
        ox.refactorize(left * flip, right * flip.T),
        ox.refactorize(left, right),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (jnp.ones((3, 2)), jnp.ones((2, 3))),
        (jnp.zeros((3, 2)), factors(3, 2, 3)[1]),
        factors(2, 3, 5),
        factors(5, 3, 2),
        (jnp.full((3, 2), jnp.nan), jnp.ones((2, 3))),
        (jnp.ones((0, 0)), jnp.ones((0, 3))),
    ],
    ids=["rank 1", "zero", "wider than tall", "r > n", "NaN", "empty"],
)
def test_a_pair_of_deficient_rank_is_left_alone(left, right):
    a, b = ox.refactorize(left, right)
    np.testing.assert_array_equal(a, left)
    np.testing.assert_array_equal(b, right)


def test_factors_keep_their_dtypes():
    left, right = factors(6, 3, 5)
    a, b = ox.refactorize(left.astype(jnp.bfloat16), right.astype(jnp.float16))
    assert (a.dtype, b.dtype) == (jnp.bfloat16, jnp.float16)
    # Eight and eleven bits; sums of three products.
    np.testing.assert_allclose(
        a.astype(float) @ b.astype(float), left @ right, rtol=0, atol=0.05
    )


@pytest.mark.parametrize("shapes", [((2, 3), (2, 3)), ((2,), (2, 3)), ((2, 1), (1,))])
def test_what_does_not_multiply_is_refused_with_its_shapes(shapes):
    with pytest.raises(ValueError, match=r"refactorize: left .* got shapes") as raised:
        ox.refactorize(*map(jnp.ones, shapes))
    assert str(shapes[0]) in str(raised.value)


# refactorize_every --------------------------------------------------------------------


def model(dtype=jnp.float32):
    left, right = factors(4, 2, 3)
    return {
        "block": {"a": left.astype(dtype), "b": right.astype(dtype)},
        "bias": jnp.ones(3, dtype),
    }


@pytest.mark.parametrize(
    "pair", [("block/a", "block/b"), ("['block']['a']", "['block']['b']")]
)
def test_factors_are_found_by_path_and_moved_where_refactorize_says(pair):
    x = model()
    tx = ox.refactorize_every(optax.sgd(0.5), period=2, pairs=[pair])
    state = tx.init(x)
    for t in (1, 2, 3):
        updates, state = jax.jit(tx.update)(x, state, x)
        want = jax.tree.map(lambda p: 0.5 * p, x)
        if t == 2:
            a, b = ox.refactorize(want["block"]["a"], want["block"]["b"])
            want["block"] = {"a": a, "b": b}
        got = optax.apply_updates(x, updates)
        jax.tree.map(
            lambda p, q: np.testing.assert_allclose(p, q, atol=1e-6), got, want
        )


@pytest.mark.parametrize("reset", [True, False])
def test_the_inner_state_starts_afresh_only_if_asked(reset):
    x, pairs = model(), (("block/a", "block/b"),)
    tx = ox.refactorize_every(optax.sgd(1.0, 0.5), 2, pairs, reset_inner=reset)
    state, outs = tx.init(x), []
    for _ in range(3):
        updates, state = tx.update(optax.tree.ones_like(x), state, x)
        outs.append(-float(updates["bias"][0]))
    assert outs == [1.0, 1.5, 1.0 if reset else 1.75]


def test_without_a_reset_and_pairs_it_is_inner():
    grads = noise(5)
    tx = ox.refactorize_every(ADAM, period=2, reset_inner=False)
    np.testing.assert_array_equal(feed(tx, grads), feed(ADAM, grads))


def test_a_pair_that_is_left_alone_gets_inners_update_exactly():
    x = {"a": jnp.full((3, 2), 0.1), "b": jnp.full((2, 3), 0.7)}
    tx = ox.refactorize_every(optax.sgd(0.3), period=1, pairs=(("a", "b"),))
    updates, _ = tx.update(x, tx.init(x), x)
    want = optax.sgd(0.3).update(x, optax.sgd(0.3).init(x))[0]
    jax.tree.map(np.testing.assert_array_equal, updates, want)


def test_bfloat16_factors_move_in_bfloat16():
    x = model(jnp.bfloat16)
    tx = ox.refactorize_every(optax.sgd(0.0), period=1, pairs=(("block/a", "block/b"),))
    updates, _ = tx.update(x, tx.init(x), x)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    moved = optax.apply_updates(x, updates)["block"]
    product = x["block"]["a"].astype(float) @ x["block"]["b"].astype(float)
    got = moved["a"].astype(float) @ moved["b"].astype(float)
    np.testing.assert_allclose(got, product, rtol=0, atol=0.05)


def test_nnx_factors_are_found_too():
    x = nnx.state(nnx.LoRA(4, 2, 3, rngs=nnx.Rngs(0)), nnx.LoRAParam)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(x)]
    tx = ox.refactorize_every(optax.sgd(0.1), period=1, pairs=[tuple(paths)])
    updates, _ = tx.update(x, tx.init(x), x)
    assert jax.tree.structure(updates) == jax.tree.structure(x)


@pytest.mark.parametrize("pairs", [("a", "b"), ("ab",), (("a", "b", "c"),), ((1, 2),)])
def test_pairs_that_are_none_are_refused_with_an_example(pairs):
    with pytest.raises(ValueError, match=r"pairs must hold pairs of paths such as"):
        ox.refactorize_every(optax.sgd(0.1), pairs=pairs)


def test_an_unknown_or_masked_path_is_named_with_the_paths_that_there_are():
    tx = ox.refactorize_every(optax.sgd(0.1), pairs=(("block/a", "b"),))
    with pytest.raises(
        ValueError, match=r"no leaf 'b' to be seen; the paths are \['bias'\], \['blo"
    ):
        tx.init(model())
    seen = {"block": {"a": True, "b": False}, "bias": True}
    masked = optax.masked(
        ox.refactorize_every(optax.sgd(0.1), pairs=(("block/a", "block/b"),)), seen
    )
    with pytest.raises(ValueError, match="no leaf 'block/b' to be seen"):
        masked.init(model())


def test_inside_a_mask_that_shows_the_pair_it_works():
    tx = ox.refactorize_every(optax.sgd(0.1), 1, pairs=(("block/a", "block/b"),))
    tx = optax.masked(tx, {"block": True, "bias": False})
    x = model()
    updates, _ = tx.update(x, tx.init(x), x)
    a = optax.apply_updates(x, updates)["block"]["a"]
    gram = np.asarray(a).T @ np.asarray(a)
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-5)
