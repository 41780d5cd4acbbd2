"""`hessian_alignment_loss`: gradients and Hessians of a head across domains."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import optax_ext as ox

rng = np.random.default_rng(0)
FEATURES = rng.normal(size=(3, 5, 2))
LABELS = jnp.asarray(rng.integers(0, 2, (3, 5)))
HEAD = {"kernel": rng.normal(size=(2, 2)), "bias": rng.normal(size=2)}
ALIGN = functools.partial(ox.losses.hessian_alignment_loss, alpha=0.3, beta=0.7)


def loss_fn(head, batch):
    features, labels = batch
    logits = features @ head["kernel"] + head["bias"][None]
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
    return -jnp.mean(picked)


def inputs(dtype=float):
    head = jax.tree.map(lambda x: jnp.asarray(x, dtype), HEAD)
    return head, (jnp.asarray(FEATURES, dtype), LABELS)


def dense(head, batches):
    """Losses, gradients and Hessians of the domains, as arrays."""
    flat, unravel = ravel_pytree(head)
    each = [
        lambda q, e=e: loss_fn(unravel(q), jax.tree.map(lambda x: x[e], batches))
        for e in range(3)
    ]
    orders = (lambda f: f, jax.grad, jax.hessian)
    return [np.stack([order(f)(flat) for f in each]) for order in orders]


def signs(dimension):
    """All vectors of signs."""
    bits = (np.arange(2**dimension)[:, None] >> np.arange(dimension)) & 1
    return 2.0 * bits - 1


def probes_of(head, vectors):
    _, unravel = ravel_pytree(head)
    return jax.vmap(unravel)(jnp.asarray(vectors))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mode", ["hgp", "hutchinson"])
def test_it_is_the_penalty_on_dense_hessians(mode):
    head, batches = inputs()
    losses, g, h = dense(head, batches)
    if mode == "hgp":
        s = np.einsum("eij,ej->ei", h, g)
        center, probes = h.mean(0) @ g.mean(0), None
    else:  # over all vectors of signs, exactly the diagonal
        s = np.einsum("eii->ei", h)
        center, probes = s.mean(0), probes_of(head, signs(6))
    curvature = ((s - center) ** 2).sum(-1).mean()
    slope = ((g - g.mean(0)) ** 2).sum(-1).mean()
    want = losses.mean() + 0.3 * curvature + 0.7 * slope
    got = ALIGN(loss_fn, head, batches, mode=mode, probes=probes)
    np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mode", ["hgp", "hutchinson"])
def test_copies_of_one_domain_cost_nothing_more(mode):
    head, batches = inputs()
    copies = jax.tree.map(lambda x: jnp.stack([x[0]] * 3), batches)
    got = ALIGN(loss_fn, head, copies, mode=mode, key=jax.random.key(0), num_probes=3)
    want = loss_fn(head, jax.tree.map(lambda x: x[0], batches))
    np.testing.assert_allclose(got, want, rtol=1e-13)


@pytest.mark.usefixtures("x64")
def test_the_gradient_reaches_features_and_head_and_agrees_with_differences():
    head, (features, labels) = inputs()
    loss = functools.partial(ALIGN, loss_fn, stop_gradient_center=False)
    direction = jnp.asarray(rng.normal(size=features.shape)), head

    def along(t):
        moved = jax.tree.map(lambda x, d: x + t * d, (features, head), direction)
        return loss(moved[1], (moved[0], labels))

    h = 1e-5
    want = (along(h) - along(-h)) / (2 * h)
    np.testing.assert_allclose(jax.jit(jax.grad(along))(0.0), want, rtol=1e-8)


@pytest.mark.usefixtures("x64")
def test_a_detached_centre_changes_the_gradient_and_not_the_value():
    head, batches = inputs()
    (value, held), (same, free) = (
        jax.value_and_grad(
            lambda q, stop=stop: ALIGN(loss_fn, q, batches, stop_gradient_center=stop)
        )(head)
        for stop in (True, False)
    )
    assert value == same
    # The squares of g - mean(g) are the same either way: only curvature differs.
    assert not np.allclose(held["kernel"], free["kernel"], rtol=1e-6)
    of_slopes = [
        jax.grad(
            lambda q, stop=stop: ox.losses.hessian_alignment_loss(
                loss_fn, q, batches, alpha=0.0, beta=1.0, stop_gradient_center=stop
            )
        )(head)["kernel"]
        for stop in (True, False)
    ]
    np.testing.assert_allclose(*of_slopes, rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_probes_are_drawn_from_the_key():
    head, batches = inputs()

    def drawn(seed, num_probes):
        return ALIGN(
            loss_fn,
            head,
            batches,
            mode="hutchinson",
            key=jax.random.key(seed),
            num_probes=num_probes,
        )

    assert drawn(0, 2) == drawn(0, 2) != drawn(1, 2)
    exact = ALIGN(
        loss_fn, head, batches, mode="hutchinson", probes=probes_of(head, signs(6))
    )
    np.testing.assert_allclose(drawn(0, 4000), exact, rtol=2e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_short_floats_are_widened_before_they_are_differentiated(dtype):
    head, batches = inputs(dtype)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (head, batches[0]))
    want = ALIGN(loss_fn, wide[0], (wide[1], LABELS))
    got, gradient = jax.value_and_grad(lambda q: ALIGN(loss_fn, q, batches))(head)
    assert (got, got.dtype) == (want, jnp.float32)
    assert {g.dtype for g in gradient.values()} == {jnp.dtype(dtype)}


def test_what_cannot_be_is_named():
    head, batches = inputs(jnp.float32)
    with pytest.raises(ValueError, match="hutchinson needs probes, or a key"):
        ALIGN(loss_fn, head, batches, mode="hutchinson")
    with pytest.raises(ValueError, match="hessian_alignment_loss: mode must be one of"):
        ALIGN(loss_fn, head, batches, mode="dense")
    with pytest.raises(ValueError, match="hessian_alignment_loss: alpha"):
        ox.losses.hessian_alignment_loss(loss_fn, head, batches, alpha=-1.0)
    with pytest.raises(AssertionError, match="loss_fn must return a scalar"):
        ALIGN(lambda q, batch: batch[0][:, 0], head, batches)
