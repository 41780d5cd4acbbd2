"""`idgm_loss`: the inner products of the gradients of all pairs of domains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ext as ox

rng = np.random.default_rng(0)
A = [m + m.T for m in rng.normal(size=(3, 4, 4))]
B = rng.normal(size=(3, 4))
X = rng.normal(size=4)


def losses(x, scale=1.0):
    a, b = jnp.asarray(A, x.dtype), jnp.asarray(B, x.dtype)
    return scale * (jnp.einsum("i,kij,j->k", x, a, x) / 2 - b @ x)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("gamma", [0.0, 0.3, -0.2])
def test_it_is_the_closed_form_on_quadratics_and_so_is_its_gradient(gamma):
    g = [a @ X - b for a, b in zip(A, B, strict=True)]
    pairs = [(0, 1), (0, 2), (1, 2)]
    means = np.mean([X @ a @ X / 2 - X @ b for a, b in zip(A, B, strict=True)])
    want = means - gamma * np.mean([g[i] @ g[j] for i, j in pairs])
    slope = sum(g) / 3 - gamma * np.mean(
        [A[i] @ g[j] + A[j] @ g[i] for i, j in pairs], axis=0
    )
    loss_fn = ox.losses.idgm_loss(losses, gamma)
    value, gradient = jax.jit(jax.value_and_grad(loss_fn))(jnp.asarray(X))
    np.testing.assert_allclose(value, want, rtol=1e-13)
    np.testing.assert_allclose(gradient, slope, rtol=1e-12)


def test_further_arguments_reach_the_losses():
    loss_fn = ox.losses.idgm_loss(losses, 0.0)
    x = jnp.asarray(X, jnp.float32)
    want = loss_fn(x) * 2
    np.testing.assert_allclose(loss_fn(x, 2.0), want, rtol=1e-6)
    np.testing.assert_allclose(loss_fn(x, scale=2.0), want, rtol=1e-6)


def test_inner_products_go_over_all_leaves_and_skip_holes():
    def of_tree(p):
        total = jnp.sum(p["a"]) + 2 * jnp.sum(p["b"]).astype(jnp.float32)
        return jnp.stack([total, 3 * total])

    params = {"a": jnp.ones((2, 2)), "b": jnp.ones(3, jnp.bfloat16), "hole": None}
    value = ox.losses.idgm_loss(of_tree, 1.0)(params)
    # Losses 10 and 30; gradients 1 and 3 on four entries, 2 and 6 on three.
    assert value == 20 - (4 * 3 + 3 * 12)
    assert value.dtype == jnp.float32


def test_one_domain_has_no_pairs():
    loss_fn = ox.losses.idgm_loss(lambda x: jnp.sum(x**2)[None], 5.0)
    assert loss_fn(jnp.ones(3)) == 3


def test_losses_that_are_no_vector_are_refused():
    with pytest.raises(AssertionError, match="per_domain_losses_fn must return a vec"):
        ox.losses.idgm_loss(jnp.sum, 0.1)(jnp.ones(3))


def test_a_gamma_that_is_no_number_is_named():
    with pytest.raises(TypeError, match="idgm_loss: gamma must be a number"):
        ox.losses.idgm_loss(losses, gamma="0.1")  # pyright: ignore[reportArgumentType]
