"""DPO and SimPO."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ext as ox

LOG2 = np.log(2)


def pairs(seed=0, dtype=float):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(-8, 3, 7), dtype) for _ in range(4))


def log_sigmoid(x):
    return -np.log1p(np.exp(-np.asarray(x)))


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo"])
def test_dpo_is_the_printed_formula(x64, kind, beta, smoothing):
    w, l, ref_w, ref_l = pairs()
    got = ox.losses.dpo_loss(
        w, l, ref_w, ref_l, beta=beta, label_smoothing=smoothing, loss_type=kind
    )
    x = np.asarray((w - l) - (ref_w - ref_l))
    want = {
        "sigmoid": -(1 - smoothing) * log_sigmoid(beta * x)
        - smoothing * log_sigmoid(-beta * x),
        "hinge": np.maximum(0, 1 - beta * x),
        "ipo": (x - 1 / (2 * beta)) ** 2,
    }[kind]
    np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_the_reference_itself_has_the_losses_worked_out_by_hand(x64, beta):
    w, l, _, _ = pairs(1)
    for kind, want in {"sigmoid": LOG2, "hinge": 1, "ipo": 1 / (4 * beta**2)}.items():
        got = ox.losses.dpo_loss(w, l, w, l, beta=beta, loss_type=kind)
        np.testing.assert_allclose(got, jnp.full(7, want), rtol=1e-14)


def test_the_gradient_of_dpo_is_large_where_the_order_is_wrong(x64):
    w, l, ref_w, ref_l = pairs(2)

    def total(w, l):
        return ox.losses.dpo_loss(w, l, ref_w, ref_l, beta=0.3).sum()

    of_w, of_l = jax.grad(total, (0, 1))(w, l)
    x = (w - l) - (ref_w - ref_l)
    np.testing.assert_allclose(of_w, -0.3 * jax.nn.sigmoid(-0.3 * x), rtol=1e-13)
    np.testing.assert_array_equal(of_l, -of_w)


@pytest.mark.parametrize(("x", "loss"), [(-800.0, 80.0), (-1e4, 1000.0), (1e4, 0.0)])
def test_hopeless_and_certain_pairs_are_finite(x, loss):
    zero = jnp.float32(0)
    value, grad = jax.value_and_grad(ox.losses.dpo_loss)(
        jnp.float32(x), zero, zero, zero
    )
    assert value == pytest.approx(loss, rel=1e-6)
    assert grad == pytest.approx(-0.1 if x < 0 else 0, rel=1e-6)
    value, grad = jax.value_and_grad(ox.losses.simpo_loss)(
        jnp.float32(x), zero, beta=10.0, gamma=0.0
    )
    assert value == pytest.approx(max(-10 * x, 0), rel=1e-6)
    assert grad == pytest.approx(-10 if x < 0 else 0, rel=1e-6)


@pytest.mark.parametrize(("beta", "gamma"), [(2.0, 0.5), (10.0, 3.0), (2.5, 0.0)])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["sigmoid", "hinge"])
def test_simpo_is_the_printed_formula(x64, kind, smoothing, beta, gamma):
    w, l, _, _ = (x / 8 for x in pairs(3))
    got = ox.losses.simpo_loss(
        w, l, beta=beta, gamma=gamma, label_smoothing=smoothing, loss_type=kind
    )
    m = np.asarray(beta * (w - l) - gamma)
    want = {
        "sigmoid": -(1 - smoothing) * log_sigmoid(m) - smoothing * log_sigmoid(-m),
        "hinge": np.maximum(0, 1 - m),
    }[kind]
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_equal_averages_without_a_margin_lose_log_two(x64):
    w, *_ = pairs(4)
    got = ox.losses.simpo_loss(w, w, gamma=0.0)
    np.testing.assert_allclose(got, jnp.full(7, LOG2), rtol=1e-15)


def token_loss(loss, logits, labels, where):
    """A loss of pairs of answers, from the logits of (chosen, rejected)."""
    average = loss is ox.losses.simpo_loss
    w, l = (
        ox.losses.sequence_log_probs(x, y, where=m, average=average)
        for x, y, m in zip(logits, labels, where, strict=True)
    )
    if average:
        return loss(w, l).sum()
    reference = jnp.zeros_like(w), jnp.zeros_like(l)
    return loss(w, l, *reference).sum()


def answer_pairs(length_w, length_l):
    rng = np.random.default_rng(5)
    shape = (1, 8, 4)
    logits = [jnp.asarray(rng.normal(size=shape)) for _ in range(2)]
    labels = [jnp.asarray(rng.integers(0, 4, shape[:2])) for _ in range(2)]
    where = [jnp.arange(8)[None] < n for n in (length_w, length_l)]
    return logits, labels, where


def test_simpo_does_not_see_that_every_token_comes_twice_and_dpo_does(x64):
    once = answer_pairs(8, 3)
    twice = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=1), once)
    simpo, dpo = ox.losses.simpo_loss, ox.losses.dpo_loss
    assert token_loss(simpo, *twice) == pytest.approx(
        float(token_loss(simpo, *once)), rel=1e-14
    )
    gap = float(token_loss(dpo, *twice) - token_loss(dpo, *once))
    assert abs(gap) > 0.1


def test_simpo_divides_the_gradient_of_a_token_by_the_length_and_dpo_does_not(x64):
    logits, labels, where = answer_pairs(8, 2)

    def gradient_by_token(loss):
        """Of the loss by log p of each token, from logits that shift all of it."""

        def total(shifts):
            w, l = (
                ox.losses.token_log_probs(x, y) + s
                for x, y, s in zip(logits, labels, shifts, strict=True)
            )
            w, l = ((t * m).sum(-1) for t, m in zip((w, l), masks, strict=True))
            if loss is ox.losses.simpo_loss:
                return loss(w / 8, l / 2).sum()
            return loss(w, l, w * 0, l * 0).sum()

        masks = [m.astype(float) for m in where]
        return jax.grad(total)([jnp.zeros((1, 8))] * 2)

    w, l = gradient_by_token(ox.losses.simpo_loss)
    np.testing.assert_allclose(4 * w[0, :2], -l[0, :2], rtol=1e-13)
    w, l = gradient_by_token(ox.losses.dpo_loss)
    np.testing.assert_allclose(w[0, :2], -l[0, :2], rtol=1e-13)


def test_no_gradient_flows_into_the_reference():
    w, l, ref_w, ref_l = pairs(6, jnp.float32)
    grads = jax.grad(lambda *ref: ox.losses.dpo_loss(w, l, *ref).sum(), (0, 1))(
        ref_w, ref_l
    )
    for grad in grads:
        np.testing.assert_array_equal(grad, jnp.zeros(7))


def test_hyperparameters_may_be_traced(x64):
    w, l, ref_w, ref_l = pairs(7)
    betas = jnp.array([0.1, 0.5], jnp.float32)
    got = jax.vmap(lambda b: ox.losses.dpo_loss(w, l, ref_w, ref_l, beta=b))(betas)
    for row, beta in zip(got, betas, strict=True):
        want = ox.losses.dpo_loss(w, l, ref_w, ref_l, beta=float(beta))
        np.testing.assert_allclose(row, want, rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta must lie in"),
        ({"label_smoothing": 1.5}, "label_smoothing must lie in"),
        ({"loss_type": "ranking"}, "loss_type must be one of"),
    ],
)
def test_bad_hyperparameters_are_named(options, message):
    x = jnp.zeros(2)
    with pytest.raises(ValueError, match=message):
        ox.losses.dpo_loss(x, x, x, x, **options)
    with pytest.raises(ValueError, match=message):
        ox.losses.simpo_loss(x, x, **options)
    with pytest.raises(ValueError, match="gamma must lie in"):
        ox.losses.simpo_loss(x, x, gamma=-1.0)


def test_shapes_and_dtypes_that_do_not_fit_are_named():
    x = jnp.zeros(2)
    with pytest.raises(AssertionError, match="ref_rejected_logps"):
        ox.losses.dpo_loss(x, x, x, jnp.zeros(3))
    with pytest.raises(AssertionError, match="chosen_logps, rejected_logps"):
        ox.losses.simpo_loss(x, jnp.zeros(3))
    with pytest.raises(AssertionError, match="rejected_logps must be floating point"):
        ox.losses.simpo_loss(x, jnp.zeros(2, jnp.int32))
