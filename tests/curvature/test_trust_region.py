"""Trust regions: the five balls, momentum, and weights that stay in a ball."""

# Trees of arrays, which the types of optax leave open.
# pyright: reportOperatorIssue=false

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalSubscript=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox

NORMS = {
    "linf": lambda x: np.max(np.abs(x)),
    "l2": np.linalg.norm,
    "l1": lambda x: np.sum(np.abs(x)),
    "spectral": lambda x: np.linalg.norm(x, 2),
    "nuclear": lambda x: np.linalg.norm(x, "nuc"),
}
DUALS = {
    "linf": "l1",
    "l2": "l2",
    "l1": "linf",
    "spectral": "nuclear",
    "nuclear": "spectral",
}
EXACT = {"spectral_method": "svd"}


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def first(tx, grads):
    return tx.update(grads, tx.init(grads))[0]


# The balls ----------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_the_direction_has_norm_1_and_the_inner_product_is_the_dual_norm(norm, x64):
    x = normal(6, 4, dtype=jnp.float64)
    d = ox.lmo(x, norm)
    np.testing.assert_allclose(NORMS[norm](d), 1, rtol=1e-12)
    np.testing.assert_allclose(jnp.vdot(x, d), NORMS[DUALS[norm]](x), rtol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_the_direction_of_any_scale_is_that_of_scale_1_and_zero_stays_zero(norm, size):
    x = normal(5, 3)
    want = ox.lmo(x, norm) if size else jnp.zeros_like(x)
    np.testing.assert_allclose(ox.lmo(x * size, norm), want, atol=1e-6)


def test_the_largest_entry_is_the_first_one_on_ties():
    np.testing.assert_array_equal(
        ox.lmo(jnp.array([[1.0, -2.0], [2.0, 0.0]]), "l1"), [[0, -1], [0, 0]]
    )


def test_singular_values_that_are_rounding_do_not_count():
    low_rank = normal(6, 2) @ normal(2, 5, seed=1)
    s = np.linalg.svd(ox.lmo(low_rank, "spectral"))[1]
    np.testing.assert_allclose(s, [1, 1, 0, 0, 0], atol=1e-5)


@pytest.mark.parametrize("norm", ["spectral", "nuclear"])
def test_vectors_and_scalars_have_the_euclidean_ball_for_a_spectral_one(norm):
    np.testing.assert_allclose(ox.lmo(jnp.array([3.0, -4.0]), norm), [0.6, -0.8])
    assert ox.lmo(jnp.float32(-3.0), norm) == -1
    assert ox.lmo(jnp.zeros((0, 3)), norm).shape == (0, 3)


@pytest.mark.parametrize("norm", ["spectral", "nuclear"])
def test_a_convolution_is_the_matrix_of_its_last_axis(norm):
    x = normal(2, 3, 2, 4)
    want = ox.lmo(x.reshape(12, 4), norm).reshape(x.shape)
    np.testing.assert_allclose(ox.lmo(x, norm), want, atol=1e-6)


def test_16_bit_arrays_come_back_in_16_bits():
    assert ox.lmo(normal(3, 2, dtype=jnp.bfloat16), "spectral").dtype == jnp.bfloat16


# The link -----------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_momentum_starts_at_the_first_gradient(norm):
    tx = ox.scale_by_trust_region(norm, b1=0.8, **EXACT)
    a, b = normal(4, 3), normal(4, 3, seed=1)
    got, state = tx.update(a, tx.init(a))
    np.testing.assert_allclose(got, ox.lmo(a, norm), atol=1e-6)
    got, state = tx.update(b, state)
    np.testing.assert_allclose(state.mu, 0.8 * a + 0.2 * b, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got, ox.lmo(0.8 * a + 0.2 * b, norm), atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_the_scale_of_the_gradient_does_not_matter(norm):
    grads = [normal(4, 3, seed=i) for i in range(3)]
    runs = []
    for scale in (1.0, 7.0):
        tx = ox.scale_by_trust_region(norm)
        state = tx.init(grads[0])
        for g in grads:
            u, state = tx.update(scale * g, state)
        runs.append(u)
    np.testing.assert_allclose(*runs, atol=2e-5)


def test_without_momentum_it_is_sign_descent_or_normalised_descent():
    grads = {"w": normal(4, 3), "b": normal(3, seed=1)}
    for norm, theirs, options in (
        ("linf", optax.scale_by_sign(), {}),
        ("l2", optax.normalize_by_update_norm(), {"scope": "global"}),
    ):
        got = first(ox.scale_by_trust_region(norm, b1=0.0, **options), grads)
        want = first(theirs, grads)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5), got, want)


def test_newton_schulz_turns_as_the_svd_does_and_misses_1_by_a_third():
    g = normal(8, 5)
    exact, fast = (
        np.asarray(first(ox.scale_by_trust_region(spectral_method=method), g))
        for method in ("svd", "newton_schulz")
    )
    s = np.linalg.svd(exact.T @ fast)[1]
    np.testing.assert_allclose(exact.T @ fast, (exact.T @ fast).T, atol=1e-5)
    assert 0.65 < s.min()
    assert s.max() < 1.3


def test_more_newton_schulz_steps_bring_small_singular_values_up():
    g = jnp.diag(jnp.array([1.0, 1e-4]))
    one, many = (
        first(ox.scale_by_trust_region(ns_steps=steps), g)[1, 1] for steps in (1, 8)
    )
    assert one < 1e-3
    assert many > 0.5


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_in_the_global_scope_the_tree_is_one_vector(norm):
    grads = {"a": normal(3, 2), "hole": None, "b": normal(4, seed=1)}
    got = first(ox.scale_by_trust_region(norm, scope="global"), grads)
    flat = jnp.concatenate([grads["a"].ravel(), grads["b"]])
    want = ox.lmo(flat, norm)
    assert got["hole"] is None
    np.testing.assert_allclose(got["a"].ravel(), want[:6], rtol=1e-6)
    np.testing.assert_allclose(got["b"], want[6:], rtol=1e-6)


def test_the_global_scope_leaves_other_norms_alone():
    grads = {"a": normal(3, 2), "b": normal(4, seed=1), "c": normal(2, seed=2)}
    norms = {"a": "linf", "b": "l2", "c": "l2"}
    got = first(ox.scale_by_trust_region(norms, scope="global"), grads)
    np.testing.assert_array_equal(got["a"], jnp.sign(grads["a"]))
    both = jnp.concatenate([got["b"], got["c"]])
    np.testing.assert_allclose(jnp.linalg.norm(both), 1, rtol=1e-6)


def test_norms_go_by_a_tree_a_prefix_or_a_function_of_the_path():
    grads = {"embed": normal(3), "block": {"w": normal(3, 2), "b": normal(2)}}
    prefix = {"embed": "linf", "block": "l1"}
    full = {"embed": "linf", "block": {"w": "l1", "b": "l1"}}
    by_path = lambda path: "linf" if path == "['embed']" else "l1"  # noqa: E731
    for norm in (prefix, full, by_path):
        got = first(ox.scale_by_trust_region(norm), grads)
        for leaf in jax.tree.leaves(got["block"]):
            assert jnp.sum(jnp.abs(leaf)) == 1
        np.testing.assert_array_equal(got["embed"], jnp.sign(grads["embed"]))


def test_momentum_is_float32_unless_asked_otherwise():
    p = normal(3, 2, dtype=jnp.bfloat16)
    assert ox.scale_by_trust_region().init(p).mu.dtype == jnp.float32
    state = ox.scale_by_trust_region(mu_dtype=jnp.bfloat16).init(p)
    assert state.mu.dtype == jnp.bfloat16


# The optimizer ------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_with_decay_weights_that_start_in_the_ball_stay_there(norm):
    decay = 0.5
    p = ox.lmo(normal(4, 3), norm) / decay
    tx = ox.norm_trust_region(0.1, norm, weight_decay=decay, **EXACT)

    def step(carry, g):
        p, state = carry
        u, state = tx.update(g, state, p)
        return (p + u, state), p + u

    grads = normal(500, 4, 3, seed=1) + 1
    _, path = jax.jit(lambda g: jax.lax.scan(step, (p, tx.init(p)), g))(grads)
    lengths = np.array([NORMS[norm](np.asarray(x, np.float64)) for x in path])
    assert lengths.max() <= (1 + 1e-5) / decay
    assert lengths.max() > 0.5 / decay  # the bound is nearly reached


def test_only_masked_leaves_decay_and_decay_is_times_the_learning_rate():
    p = {"w": normal(3, 2), "b": normal(3)}
    tx = ox.norm_trust_region(0.1, "l2", 0.9, 0.5, mask={"w": True, "b": False})
    zero = jax.tree.map(jnp.zeros_like, p)
    u, _ = tx.update(zero, tx.init(p), p)
    np.testing.assert_allclose(u["w"], -0.05 * p["w"], rtol=1e-6)
    assert not u["b"].any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ox.lmo(jnp.ones(2), "l3"), "lmo: norm must be one of"),
        (lambda: ox.scale_by_trust_region("l3"), "norm must be one of"),
        (lambda: ox.scale_by_trust_region({"w": "l3"}), "norm must be one of"),
        (lambda: ox.scale_by_trust_region(b1=1.0), "b1 must lie in"),
        (lambda: ox.scale_by_trust_region(scope="tree"), "scope must be one of"),
        (lambda: ox.scale_by_trust_region(ns_steps=0), "ns_steps must be an integer"),
        (
            lambda: ox.scale_by_trust_region(spectral_method="qr"),
            "spectral_method must be one of",
        ),
        (
            lambda: first(ox.scale_by_trust_region(lambda _: "l3"), {"w": jnp.ones(2)}),
            r"norm at \['w'\] must be one of",
        ),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()
