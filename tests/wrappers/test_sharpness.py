"""`sharpness_aware` and `adversarial_weight_perturbation`."""

# Arrays and trees, which the types of jax and optax leave open.
# pyright: reportOperatorIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox

SAM, AWP = ox.sharpness_aware, ox.adversarial_weight_perturbation
BOTH = pytest.mark.parametrize("make", [SAM, AWP], ids=lambda f: f.__name__)
rng = np.random.default_rng(0)
PARAMS = {
    "in": rng.normal(size=(3, 8)),
    "bias": rng.normal(size=8),
    "out": rng.normal(size=(8, 2)),
}
X, Y = rng.normal(size=(6, 3)), rng.normal(size=(6, 2))


def params_like(dtype=float):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), PARAMS)


def loss(p):
    dtype = p["in"].dtype
    hidden = jax.nn.relu(jnp.asarray(X, dtype) @ p["in"] + p["bias"][None])
    return jnp.mean((hidden @ p["out"] - jnp.asarray(Y, dtype)) ** 2)


def half_square(p):
    """Its gradient is the point where it is taken."""
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(p)) / 2


def emitted(tx, p, f=loss, g=None, state=None):
    g = jax.grad(f)(p) if g is None else g
    return tx.update(g, tx.init(p) if state is None else state, p, value_fn=f)[0]


def displacement(tx, p, g):
    """How far from p the gradient is taken."""
    return jax.tree.map(jnp.subtract, emitted(tx, p, half_square, g), p)


def assert_close(got, want, rtol=1e-13):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, rtol), got, want)


def trajectory(tx, steps, **functions):
    def step(carry, _):
        p, state = carry
        updates, state = tx.update(jax.grad(loss)(p), state, p, **functions)
        p = optax.apply_updates(p, updates)
        return (p, state), p

    p = params_like()
    return jax.lax.scan(step, (p, tx.init(p)), length=steps)[1]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("rho", [0.05, 2.0])
def test_sam_moves_by_rho_along_the_whole_gradient(rho):
    p = params_like()
    g = jax.grad(loss)(p)
    norm = optax.tree.norm(g)
    want = jax.tree.map(lambda g: rho * g / norm, g)
    assert_close(displacement(SAM(optax.identity(), rho=rho), p, g), want)


@pytest.mark.usefixtures("x64")
def test_on_a_quadratic_sam_is_the_gradient_plus_the_hessian_times_its_direction():
    h = jnp.asarray(rng.normal(size=(4, 4)))
    h = h @ h.T
    x = jnp.asarray(rng.normal(size=4))
    g = h @ x
    want = g + 0.3 / jnp.linalg.norm(g) * h @ g
    tx = SAM(optax.identity(), rho=0.3)
    assert_close(emitted(tx, x, lambda x: x @ h @ x / 2), want)


@pytest.mark.usefixtures("x64")
def test_sam_is_that_of_optax_step_by_step():
    inner = optax.sgd(0.05, momentum=0.9)
    # A single inner step in optax's terms: one adversarial step each time.
    theirs = optax.contrib.sam(
        inner, optax.chain(optax.contrib.normalize(), optax.sgd(0.2)), opaque_mode=True
    )
    got = trajectory(SAM(inner, rho=0.2), 10, value_fn=loss)
    want = trajectory(theirs, 10, grad_fn=lambda p, _: jax.grad(loss)(p))
    assert_close(got, want, 1e-11)  # some roundings, over ten steps


@pytest.mark.usefixtures("x64")
def test_adaptive_sam_moves_along_the_gradient_times_the_squared_weights():
    p = params_like()
    g = jax.grad(loss)(p)
    norm = optax.tree.norm(jax.tree.map(lambda p, g: jnp.abs(p) * g, p, g))
    want = jax.tree.map(lambda p, g: 0.5 * p**2 * g / norm, p, g)
    assert_close(displacement(SAM(optax.identity(), 0.5, adaptive=True), p, g), want)


def rescaled(p, c):
    """The same network: layers that are scaled against each other."""
    return {"in": c * p["in"], "bias": c * p["bias"], "out": p["out"] / c}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("tx", "sees_scale"),
    [
        (SAM(optax.identity(), 0.1), True),
        (SAM(optax.identity(), 0.1, adaptive=True), False),
        (AWP(optax.identity(), 0.1), False),
    ],
    ids=["sam", "adaptive", "awp"],
)
def test_only_plain_sam_sees_that_layers_are_rescaled(tx, sees_scale):
    def perturbed_loss(p):
        d = displacement(tx, p, jax.grad(loss)(p))
        return float(loss(jax.tree.map(jnp.add, p, d)))

    p = params_like()
    change = perturbed_loss(rescaled(p, 4.0)) / perturbed_loss(p) - 1
    assert (abs(change) > 1e-3) if sees_scale else (abs(change) < 1e-12)


@pytest.mark.parametrize("tx", [SAM(optax.trace(0.9), 0.0), AWP(optax.trace(0.9), 0.0)])
def test_without_a_step_uphill_they_are_inner(tx):
    got = trajectory(tx_with_rate(tx), 5, value_fn=loss)
    want = trajectory(tx_with_rate(optax.trace(0.9)), 5)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def tx_with_rate(tx):
    return optax.with_extra_args_support(optax.chain(tx, optax.scale(-0.1)))


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("eps", [0.0, 1e-12])
def test_a_zero_gradient_moves_nothing_and_makes_no_nan(adaptive, eps):
    p = params_like()
    zero = jax.tree.map(jnp.zeros_like, p)
    tx = SAM(optax.identity(), 0.5, adaptive, eps)
    jax.tree.map(
        lambda d: np.testing.assert_array_equal(d, 0), displacement(tx, p, zero)
    )
    jax.tree.map(
        lambda d: np.testing.assert_array_equal(d, 0),
        displacement(AWP(optax.identity(), 0.5), p, zero),
    )


def test_eps_adds_to_the_norm_of_the_gradient():
    p = jnp.array([[3.0, 4.0]])
    tiny = p / 5
    sam = displacement(SAM(optax.identity(), 1.0, eps=1.0), p, tiny)
    np.testing.assert_allclose(sam, tiny / 2, rtol=1e-5)
    awp = displacement(AWP(optax.identity(), 1.0, eps=1.0), p, tiny)
    np.testing.assert_allclose(awp, 5 * tiny / 2, rtol=1e-6)


def test_the_radius_may_be_a_schedule_of_the_step_from_zero():
    schedule = optax.piecewise_constant_schedule(0.5, {2: 0.1})
    tx = SAM(optax.identity(), schedule)
    x = jnp.array([3.0, 4.0])
    state, radii = tx.init(x), []
    for _ in range(4):
        out, state = tx.update(x, state, x, value_fn=half_square)
        radii.append(float(jnp.linalg.norm(out - x)))
    # 5 + radius in float32.
    np.testing.assert_allclose(radii, [0.5, 0.5, 0.05, 0.05], atol=1e-6)


@pytest.mark.usefixtures("x64")
@BOTH
def test_decay_inside_sees_the_parameters_where_they_are(make):
    p = params_like()
    plain = emitted(make(optax.identity()), p)
    decayed = emitted(make(optax.add_decayed_weights(0.1)), p)
    assert_close(decayed, jax.tree.map(lambda g, p: g + 0.1 * p, plain, p))


@BOTH
def test_they_take_one_gradient_a_step_and_hand_extra_arguments_on(make):
    calls, seen = [], []

    def counted(p):
        calls.append(1)
        return loss(p)

    def update(updates, state, params=None, **extra):
        seen.append((sorted(extra), extra["value"]))
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda p: (), update)
    p = params_like()
    tx = make(inner)
    tx.update(jax.grad(loss)(p), tx.init(p), p, value_fn=counted, value=7.0)
    assert len(calls) == 1
    assert seen == [(["value", "value_fn"], 7.0)]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("gamma", [0.01, 0.5])
def test_awp_moves_each_kernel_by_gamma_of_its_norm_and_no_bias(gamma):
    p = params_like()
    d = displacement(AWP(optax.identity(), gamma), p, jax.grad(loss)(p))
    for name in ("in", "out"):
        ratio = jnp.linalg.norm(d[name]) / jnp.linalg.norm(p[name])
        np.testing.assert_allclose(ratio, gamma, rtol=1e-12)
    np.testing.assert_array_equal(d["bias"], 0)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "mask", [None, {"in": False, "bias": True, "out": False}], ids=["kernels", "mask"]
)
def test_awp_is_the_gradient_of_the_loss_function_of_the_same_name(mask):
    p = params_like()
    want = ox.losses.awp_value_and_grad(loss, gamma=0.2, mask=mask)(p)[1]
    assert_close(emitted(AWP(optax.identity(), 0.2, mask=mask), p), want)


def test_awp_waits_for_its_first_step_and_takes_no_gradient_till_then():
    calls = []

    def counted(p):
        jax.debug.callback(lambda: calls.append(1))
        return half_square(p)

    tx = AWP(optax.identity(), 0.5, start_step=2)
    w = jnp.array([[3.0, 4.0]])
    state, outs, so_far = tx.init(w), [], []
    step = jax.jit(lambda g, s: tx.update(g, s, w, value_fn=counted))
    for _ in range(4):
        out, state = step(w, state)
        jax.effects_barrier()
        outs.append(out)
        so_far.append(len(calls))
    np.testing.assert_allclose(outs, [w, w, 1.5 * w, 1.5 * w], rtol=1e-6)
    assert so_far == [0, 0, 1, 2]


def test_frozen_leaves_do_not_move():
    w = {"w": jnp.array([[3.0, 4.0]]), "frozen": jnp.ones((2, 2))}
    g = {"w": w["w"], "frozen": None}

    def f(p):
        np.testing.assert_array_equal(p["frozen"], 1)
        return jnp.sum(p["w"] ** 2) / 2

    for tx, factor in (
        (SAM(optax.identity(), 1.0), 1.2),
        (AWP(optax.identity(), 1), 2),
    ):
        out = tx.update(g, tx.init(w), w, value_fn=f)[0]
        np.testing.assert_allclose(out["w"], factor * w["w"], rtol=1e-6)
        assert out["frozen"] is None


@BOTH
def test_a_missing_function_or_parameters_are_named(make):
    p = params_like()
    tx = make(optax.identity())
    with pytest.raises(ValueError, match=rf"{make.__name__}.*'value_fn'"):
        tx.update(p, tx.init(p), p)
    with pytest.raises(ValueError, match=rf"{make.__name__}.*parameters"):
        tx.update(p, tx.init(p), value_fn=loss)


@pytest.mark.parametrize(
    ("make", "argument", "value"),
    [
        (SAM, "rho", -1.0),
        (SAM, "eps", -1.0),
        (AWP, "gamma", -1.0),
        (AWP, "eps", -1.0),
        (AWP, "start_step", -1),
        (AWP, "start_step", 1.5),
    ],
)
def test_hyperparameters_outside_their_range_are_refused_by_name(make, argument, value):
    with pytest.raises(ValueError, match=f"{make.__name__}: {argument}"):
        make(optax.identity(), **{argument: value})
