"""`refresh`: unlearn, then learn."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox


def f(x):
    return jnp.sum(x**4) / 4 + jnp.sum(jnp.outer(x, x)) / 3


grad_fn = jax.grad(f)
X = jnp.array([0.5, -1.0, 2.0])


def once(tx, x=X, g=None, grad_fn=grad_fn, **extra):
    g = grad_fn(x) if g is None else g
    return tx.update(g, tx.init(x), x, grad_fn=grad_fn, **extra)[0]


def test_a_step_of_0_is_inner():
    out = once(ox.refresh(optax.sgd(0.1), gamma=0.0))
    np.testing.assert_array_equal(out, -0.1 * grad_fn(X))


@pytest.mark.usefixtures("x64")
def test_without_noise_the_displacement_is_up_then_down():
    x, gamma, lr = X.astype(float), 0.05, 0.1
    out = once(ox.refresh(optax.sgd(lr), gamma, noise_scale=0.0), x)
    g = grad_fn(x)
    want = gamma * g - lr * grad_fn(x + gamma * g)
    np.testing.assert_allclose(out, want, rtol=1e-15)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("normalize", [False, True])
def test_every_argument_of_two_steps_without_noise(normalize):
    x, fisher = X.astype(float), jnp.array([0.0, 1.0, 4.0])
    q = np.asarray(x)
    for _ in range(2):
        a = np.asarray(grad_fn(jnp.asarray(q)))
        if normalize:
            a = a * np.linalg.norm(q) / np.linalg.norm(a)
        q = q + 0.05 / (0.5 + np.asarray(fisher)) * a
    want = q - 0.1 * grad_fn(jnp.asarray(q)) - x
    tx = ox.refresh(
        optax.sgd(0.1), 0.05, 2, damping=0.5, noise_scale=0.0, normalize=normalize
    )
    np.testing.assert_allclose(once(tx, x, hessian_diag=fisher), want, rtol=1e-13)


def test_the_first_unlearning_step_takes_the_incoming_gradient():
    tx = ox.refresh(optax.sgd(0.0), 0.5, noise_scale=0.0)
    np.testing.assert_array_equal(once(tx, g=jnp.ones(3)), [0.5] * 3)


@pytest.mark.parametrize("normalize", [False, True])
def test_the_noise_has_the_variance_of_its_law(normalize):
    n, gamma, scale, fisher = 100_000, 0.02, 0.7, 3.0
    tx = ox.refresh(
        optax.sgd(1.0), gamma, damping=1.0, noise_scale=scale, normalize=normalize
    )
    x = jnp.zeros(n)
    out = once(tx, x, grad_fn=jnp.zeros_like, hessian_diag=jnp.full(n, fisher))
    p = 1 / (1 + fisher)
    std = gamma * p * scale if normalize else scale * np.sqrt(2 * gamma * p)
    # The standard error of a standard deviation is 1/sqrt(2 n) = 0.2% of it.
    np.testing.assert_allclose(np.std(out), std, rtol=0.01)
    assert abs(np.mean(out)) < 5 * std / np.sqrt(n)


def test_noise_is_new_at_each_step_and_leaf_and_repeats_with_the_key():
    x = {"a": jnp.zeros(4), "b": jnp.zeros(4)}
    zeros = {"grad_fn": lambda q: jax.tree.map(jnp.zeros_like, q)}

    def two_steps(key):
        tx = ox.refresh(optax.sgd(1.0), 0.1, key=key)
        first, state = tx.update(x, tx.init(x), x, **zeros)
        second, _ = tx.update(x, state, x, **zeros)
        return np.stack([first["a"], first["b"], second["a"], second["b"]])

    draws = two_steps(jax.random.key(1))
    assert len(np.unique(draws)) == draws.size
    np.testing.assert_array_equal(draws, two_steps(jax.random.PRNGKey(1)))
    assert (draws != two_steps(None)).all()
    np.testing.assert_array_equal(two_steps(None), two_steps(jax.random.key(0)))


def test_inner_sees_the_unlearned_parameters_and_the_gradient_there():
    def seen(g, state, params, *, grad, value, **others):
        assert value == 1.0
        return params, (g, grad)

    inner = optax.GradientTransformationExtraArgs(lambda p: (p, p), seen)
    tx = ox.refresh(inner, 0.1, noise_scale=0.0)
    out, state = tx.update(
        jnp.ones(3), tx.init(X), X, grad_fn=grad_fn, grad=jnp.ones(3), value=1.0
    )
    q = X + 0.1
    np.testing.assert_allclose(out, q + 0.1, rtol=1e-6)
    np.testing.assert_allclose(state.inner_state[0], grad_fn(q), rtol=1e-6)
    np.testing.assert_array_equal(*state.inner_state)


def test_steps_that_bfloat16_parameters_cannot_hold_are_emitted_all_the_same():
    x = jnp.ones(2, jnp.bfloat16)
    tx = ox.refresh(optax.sgd(0.0), 2.0**-12, noise_scale=0.0)
    out = once(tx, x, g=jnp.ones(2, jnp.bfloat16), grad_fn=jnp.zeros_like)
    np.testing.assert_array_equal(out.astype(float), [2.0**-12] * 2)
    assert out.dtype == jnp.bfloat16


def test_negative_curvature_counts_as_none():
    tx = ox.refresh(optax.sgd(0.0), 0.5, damping=1.0)
    out = once(tx, hessian_diag=jnp.array([-1.0, -5.0, 0.0]))
    np.testing.assert_array_equal(out, once(tx))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gamma": -1.0}, r"gamma must lie in \[0.0"),
        ({"noise_scale": -1.0}, r"noise_scale must lie in \[0.0"),
        ({"damping": 0.0}, r"damping must lie in \(0.0"),
        ({"num_unlearn": 0}, "num_unlearn must be an integer"),
    ],
)
def test_wrong_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=f"refresh: {message}"):
        ox.refresh(optax.sgd(0.1), **{"gamma": 0.1, **changed})


def test_what_is_missing_is_named():
    tx = ox.refresh(optax.sgd(0.1), 0.1)
    with pytest.raises(ValueError, match="refresh needs the extra argument 'grad_fn'"):
        tx.update(X, tx.init(X), X)
    with pytest.raises(ValueError, match="refresh needs the parameters"):
        tx.update(X, tx.init(X), grad_fn=grad_fn)
