"""Cross-entropies that do not saturate, and normalised ones."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox

stablemax = ox.losses.stablemax_cross_entropy_with_integer_labels
sigmoid_loss = ox.losses.normalized_sigmoid_binary_cross_entropy
softmax_loss = ox.losses.normalized_softmax_cross_entropy_with_integer_labels


def random_batch(seed=0, shape=(7, 5), scale=3.0):
    rng = np.random.default_rng(seed)
    labels = jnp.asarray(rng.integers(shape[-1], size=shape[:-1]))
    return jnp.asarray(scale * rng.normal(size=shape)), labels


# Stablemax ----------------------------------------------------------------------------


def printed_stablemax(logits, labels):
    x, y = np.asarray(logits, np.float64), np.asarray(labels)
    s = np.where(x >= 0, x + 1, 1 / (1 - np.minimum(x, 0)))
    own = np.take_along_axis(s, y[..., None], -1)[..., 0]
    return np.log(s.sum(axis=-1)) - np.log(own)


def test_stablemax_is_the_printed_formula(x64):
    logits, labels = random_batch(scale=20.0)
    want = printed_stablemax(logits, labels)
    np.testing.assert_allclose(stablemax(logits, labels), want, rtol=1e-12)


def test_equal_logits_of_k_classes_cost_log_k():
    for value in (-5.0, 0.0, 1.0, 7.0):
        loss = stablemax(jnp.full((2, 6), value), jnp.array([0, 5]))
        np.testing.assert_allclose(loss, np.log(6), rtol=1e-6)


@pytest.mark.parametrize("a", [0.0, 1.0, 17.0, 1e3, 1e6, 1e12])
def test_a_lead_of_a_has_its_closed_form_and_never_saturates(a):
    def loss(a):
        return stablemax(jnp.stack([a, jnp.zeros_like(a)]), jnp.asarray(0))

    value, slope = jax.value_and_grad(loss)(jnp.float32(a))
    # The logarithm of 1 + a, to 1e-7 of itself, is in an exponent: 28 * 1e-7.
    np.testing.assert_allclose(value, np.log1p(1 / (1 + a)), rtol=5e-6)
    np.testing.assert_allclose(slope, -1 / ((a + 1) * (a + 2)), rtol=5e-6)


def test_the_specifications_numbers_at_17():
    loss, slope = jax.value_and_grad(
        lambda a: stablemax(jnp.stack([a, jnp.zeros(())]), jnp.asarray(0))
    )(jnp.float32(17.0))
    np.testing.assert_allclose(loss, 0.0540672, atol=1e-7)
    np.testing.assert_allclose(slope, -0.00292398, atol=1e-8)


def test_softmax_cross_entropy_saturates_in_float32_from_17_on():
    def slope(gap):
        return jax.grad(
            lambda a: optax.losses.softmax_cross_entropy_with_integer_labels(
                jnp.stack([a, jnp.zeros(())]), jnp.asarray(0)
            )
        )(jnp.float32(gap))

    assert slope(17.0) == 0
    np.testing.assert_allclose(slope(16.5), -1.2e-7, rtol=0.01)


def test_the_slope_at_zero_is_one_from_both_sides_and_finite_at_one():
    for value in (0.0, -0.0, 1.0, 1e-9, -1e-9):
        logits = jnp.array([value, 2.0])
        grad = jax.grad(lambda x: stablemax(x, jnp.asarray(0)))(logits)
        s = 1 + abs(value)
        # d loss / d x_0 = -(share of class 1) / (1 + |x_0|), s(2) = 3.
        own = 1 / s if value < 0 else s
        np.testing.assert_allclose(grad[0], -3 / (3 + own) / s, rtol=1e-6)


def test_masked_classes_do_not_count_and_get_no_gradient():
    logits, labels = random_batch()
    labels = jnp.where(labels < 3, labels, 0)
    where = jnp.array([True, True, True, False, False])
    want = stablemax(logits[:, :3], labels)
    for mask in (where, jnp.broadcast_to(where, logits.shape)):
        got = stablemax(logits, labels, where=mask)
        np.testing.assert_allclose(got, want, rtol=1e-6)
    grad = jax.grad(lambda x: stablemax(x, labels, where=where).sum())(logits)
    np.testing.assert_array_equal(grad[:, 3:], np.zeros((7, 2)))
    assert grad[:, :3].all()


def test_where_only_the_label_counts_the_loss_is_zero():
    for logits, where in (
        (jnp.array([2.0, -3.0]), jnp.array([True, False])),
        (jnp.array([2.0]), None),
        (jnp.array([2.0, -jnp.inf]), None),
    ):
        loss, grad = jax.value_and_grad(
            lambda x, where=where: stablemax(x, jnp.asarray(0), where=where)
        )(logits)
        assert loss == 0
        np.testing.assert_array_equal(grad, np.zeros_like(grad))


@pytest.mark.parametrize("axis", [0, 1, -3])
def test_classes_may_lie_along_any_axis(axis):
    logits, labels = random_batch(shape=(4, 2, 5))
    want = stablemax(logits, labels)
    moved = jnp.moveaxis(logits, -1, axis)
    np.testing.assert_allclose(stablemax(moved, labels, axis=axis), want, rtol=1e-6)
    want = softmax_loss(logits, labels)
    np.testing.assert_allclose(softmax_loss(moved, labels, axis=axis), want, rtol=1e-6)


def test_logits_of_1e30_give_finite_losses_and_gradients():
    logits = jnp.array([[1e30, -1e30, 0.0], [-1e30, 1e30, 0.0]])
    for loss in (stablemax, softmax_loss):
        value, grad = jax.value_and_grad(
            lambda x, f=loss: f(x, jnp.array([0, 0])).sum()
        )(logits)
        assert jnp.isfinite(value)
        assert jnp.isfinite(grad).all()


# Normalised ---------------------------------------------------------------------------


def test_the_normalized_losses_are_optaxs_over_the_mean_error(x64):
    logits, labels = random_batch()
    plain = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    mass = jnp.mean(-jnp.expm1(-plain))
    np.testing.assert_allclose(softmax_loss(logits, labels), plain / mass, rtol=1e-12)

    binary = logits[:, 0]
    zero_one = labels % 2
    plain = optax.losses.sigmoid_binary_cross_entropy(binary, zero_one)
    mass = jnp.mean(jnp.abs(zero_one.astype(float) - jax.nn.sigmoid(binary)))
    got = sigmoid_loss(binary, zero_one)
    np.testing.assert_allclose(got, plain / mass, rtol=1e-12)


def test_no_gradient_flows_through_the_mean_error(x64):
    logits, labels = random_batch()

    def plain(x):
        return optax.losses.softmax_cross_entropy_with_integer_labels(x, labels)

    mass = jnp.mean(-jnp.expm1(-plain(logits)))
    got = jax.grad(lambda x: softmax_loss(x, labels).mean())(logits)
    want = jax.grad(lambda x: plain(x).mean())(logits) / mass
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-14)


def test_two_classes_of_the_softmax_are_the_sigmoid():
    logits, labels = random_batch(shape=(9, 2))
    got = softmax_loss(logits, labels)
    want = sigmoid_loss(logits[:, 1] - logits[:, 0], labels)
    np.testing.assert_allclose(got, want, rtol=2e-6)


@pytest.mark.parametrize("gap", [20.0, 60.0])
def test_a_separated_batch_keeps_its_gradient_in_float32(gap):
    logits, labels = jnp.array([gap, -gap]), jnp.array([1, 0])
    grad = jax.grad(lambda x: sigmoid_loss(x, labels, eps=1e-37).mean())(logits)
    # softmax: (1 - p) / B over the mean of 1 - p.
    np.testing.assert_allclose(grad, [-0.5, 0.5], rtol=1e-6)
    pairs = jnp.array([[0.0, gap], [gap, 0.0]])
    grad = jax.grad(lambda x: softmax_loss(x, labels, eps=1e-37).mean())(pairs)
    np.testing.assert_allclose(grad, [[0.5, -0.5], [-0.5, 0.5]], rtol=1e-6)


def test_a_mean_error_below_eps_counts_as_eps():
    logits, labels = jnp.array([[3.0, 0.0]]), jnp.array([0])
    z = jnp.array([-3.0])
    want = jax.nn.softplus(z) / 0.25
    np.testing.assert_allclose(softmax_loss(logits, labels, eps=0.25), want, rtol=1e-6)
    got = sigmoid_loss(-z, jnp.array([1]), eps=0.25)
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_, jnp.float32, jnp.bfloat16])
def test_binary_labels_may_be_integers_booleans_or_floats(dtype):
    logits = jnp.array([[2.0, -1.0], [0.5, 3.0]])
    labels = jnp.array([[1, 0], [0, 1]])
    want = sigmoid_loss(logits, labels)
    np.testing.assert_array_equal(sigmoid_loss(logits, labels.astype(dtype)), want)


# Checks -------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [stablemax, softmax_loss])
def test_labels_that_do_not_fit_are_refused(loss):
    logits = jnp.zeros((4, 3))
    with pytest.raises(AssertionError, match="shape of the logits without axis"):
        loss(logits, jnp.zeros((3,), jnp.int32))
    with pytest.raises(AssertionError, match="labels must be integers"):
        loss(logits, jnp.zeros((4,)))
    with pytest.raises(AssertionError, match="logits must be floating point"):
        loss(jnp.zeros((4, 3), jnp.int32), jnp.zeros((4,), jnp.int32))
    with pytest.raises(AssertionError, match="logits, axis"):
        loss(logits, jnp.zeros((4,), jnp.int32), axis=2)


def test_binary_labels_and_masks_of_another_shape_are_refused():
    with pytest.raises(AssertionError, match="logits, labels"):
        sigmoid_loss(jnp.zeros((4,)), jnp.zeros((4, 1)))
    with pytest.raises(AssertionError, match="where, logits"):
        stablemax(
            jnp.zeros((4, 3)), jnp.zeros((4,), jnp.int32), where=jnp.ones(4, bool)
        )


@pytest.mark.parametrize("loss", [sigmoid_loss, softmax_loss])
def test_eps_must_be_positive(loss):
    with pytest.raises(ValueError, match=f"{loss.__name__}: eps must lie in"):
        loss(jnp.zeros((2, 2)), jnp.zeros((2,), jnp.int32), eps=0.0)
