"""`make_train_step`: what it passes, returns, donates and compiles."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportOptionalSubscript=false

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState

import optax_ext as ox

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(6, 3)), jnp.float32)
Y = jnp.asarray(RNG.normal(size=(6, 2)), jnp.float32)
LABELS = jnp.asarray(RNG.integers(0, 2, size=6))


def params():
    return {"w": jnp.full((3, 2), 0.5, jnp.float32), "b": jnp.zeros(2)}


def predict(p, x):
    return x @ p["w"] + p["b"][None]


def loss_fn(p, x, y):
    return jnp.mean((predict(p, x) - y) ** 2)


def copy(tree):
    return jax.tree.map(jnp.copy, tree)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_near(a, b, rtol=1e-5, atol=1e-7):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b
    )


def spy(seen: dict[str, Any]):
    """Plain gradient descent that keeps what `update` was given."""

    def update(updates, state, params=None, **extra):
        seen.update(extra, updates=updates, params=params)
        return jax.tree.map(lambda g: -0.1 * g, updates), state

    return optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)


# What update gets ---------------------------------------------------------------------


def test_update_gets_value_gradient_and_the_loss_as_a_function():
    seen: dict[str, Any] = {}
    p = params()
    step = ox.make_train_step(loss_fn, spy(seen), jit=False)
    new, _, metrics = step(p, optax.EmptyState(), X, Y)
    value, gradient = jax.value_and_grad(loss_fn)(p, X, Y)
    assert seen["params"] is p
    np.testing.assert_array_equal(seen["value"], value)
    np.testing.assert_array_equal(metrics.loss, value)
    assert metrics.aux is None
    assert_equal(seen["grad"], gradient)
    assert_equal(seen["updates"], gradient)
    np.testing.assert_array_equal(seen["value_fn"](p), value)
    other = jax.tree.map(lambda a: a + 1, p)
    np.testing.assert_array_equal(seen["value_fn"](other), loss_fn(other, X, Y))
    assert_equal(new, jax.tree.map(lambda a, g: a - 0.1 * g, p, gradient))
    assert not {"logits_fn", "per_example_grads"} & set(seen)


def test_update_gets_the_logits_as_a_function_where_they_are_given():
    seen: dict[str, Any] = {}
    p = params()
    step = ox.make_train_step(
        loss_fn, spy(seen), logits_fn=lambda p, x, y: predict(p, x), jit=False
    )
    step(p, optax.EmptyState(), X, Y)
    np.testing.assert_array_equal(seen["logits_fn"](p), predict(p, X))


def test_aux_is_returned_and_stays_out_of_value_fn():
    def with_aux(p, x, y):
        error = predict(p, x) - y
        return jnp.mean(error**2), {"error": error}

    seen: dict[str, Any] = {}
    p = params()
    step = ox.make_train_step(with_aux, spy(seen), has_aux=True, jit=False)
    _, _, metrics = step(p, optax.EmptyState(), X, Y)
    np.testing.assert_array_equal(metrics.aux["error"], predict(p, X) - Y)
    np.testing.assert_array_equal(metrics.loss, loss_fn(p, X, Y))
    assert jnp.shape(seen["value_fn"](p)) == ()


def test_per_example_gradients_are_those_of_vmap_and_average_to_the_gradient():
    seen: dict[str, Any] = {}
    p = params()
    step = ox.make_train_step(loss_fn, spy(seen), per_example_grads=True, jit=False)
    _, _, metrics = step(p, optax.EmptyState(), X, Y)
    each = jax.vmap(lambda x, y: jax.grad(loss_fn)(p, x[None], y[None]))(X, Y)
    assert each["w"].shape == (6, 3, 2)
    assert_near(seen["per_example_grads"], each)
    value, gradient = jax.value_and_grad(loss_fn)(p, X, Y)
    assert_near(seen["updates"], gradient)
    assert_near(seen["grad"], gradient)
    np.testing.assert_allclose(metrics.loss, value, rtol=1e-6)
    np.testing.assert_allclose(seen["value_fn"](p), value, rtol=1e-6)


def test_aux_of_per_example_gradients_has_an_axis_of_examples():
    def with_aux(p, x, y):
        return loss_fn(p, x, y), jnp.sum(x)

    step = ox.make_train_step(
        with_aux, ox.lion_k(0.1), has_aux=True, per_example_grads=True
    )
    p = params()
    _, _, metrics = step(p, ox.lion_k(0.1).init(p), X, Y)
    np.testing.assert_allclose(metrics.aux, X.sum(axis=1), rtol=1e-6)


def test_functions_that_no_link_calls_are_never_traced():
    def forbidden(p, x, y):
        raise AssertionError("nobody asked for logits")

    tx = ox.lion_k(0.1)
    p = params()
    step = ox.make_train_step(loss_fn, tx, logits_fn=forbidden)
    step(p, tx.init(p), X, Y)


def test_a_batch_may_be_a_tree_with_keys_and_integers():
    def noisy(p, batch, key):
        x = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
        return jnp.mean((predict(p, x)[batch["i"]] - batch["y"][batch["i"]]) ** 2)

    tx = ox.lion_k(0.1)
    p = params()
    batch = {"x": X, "y": Y, "i": jnp.array([0, 3])}
    expected = noisy(p, batch, jax.random.key(0))
    step = ox.make_train_step(noisy, tx)
    _, _, metrics = step(p, tx.init(p), batch, jax.random.key(0))
    np.testing.assert_allclose(metrics.loss, expected, rtol=1e-6)


# Donation and compilation -------------------------------------------------------------


def test_parameters_and_state_give_their_buffers():
    tx = ox.lion_k(0.1)
    p = params()
    state = tx.init(p)
    step = ox.make_train_step(loss_fn, tx)
    x = jnp.copy(X)
    step(p, state, x, Y)
    assert all(a.is_deleted() for a in jax.tree.leaves((p, state)))
    assert not x.is_deleted()


def test_without_donation_everything_can_be_used_again():
    tx = ox.lion_k(0.1)
    p = params()
    state = tx.init(p)
    step = ox.make_train_step(loss_fn, tx, donate=False)
    first, second = step(p, state, X, Y), step(p, state, X, Y)
    assert_equal(first, second)


def test_it_is_compiled_once():
    traces = []

    def counted(p, x, y):
        traces.append(1)
        return loss_fn(p, x, y)

    tx = ox.sophia(0.01, update_interval=2, estimator=ox.hutchinson_diag())
    p = params()
    state = tx.init(p)
    step = ox.make_train_step(counted, tx)
    p, state, _ = step(p, state, X, Y)
    first = len(traces)
    for _ in range(3):
        p, state, _ = step(p, state, X, Y)
    assert len(traces) == first > 0


def test_the_bare_function_runs_inside_scan():
    tx = ox.sophia(0.01, update_interval=2, estimator=ox.hutchinson_diag())
    bare = ox.make_train_step(loss_fn, tx, jit=False)

    def body(carry, batch):
        p, state, metrics = bare(*carry, *batch)
        return (p, state), metrics.loss

    p = params()
    batches = (jnp.stack([X, X + 1, X - 1]), jnp.stack([Y, Y, Y]))
    (scanned, _), losses = jax.lax.scan(body, (p, tx.init(p)), batches)

    step = ox.make_train_step(loss_fn, tx)
    p, state = params(), tx.init(params())
    for i in range(3):
        p, state, metrics = step(p, state, batches[0][i], batches[1][i])
        np.testing.assert_allclose(losses[i], metrics.loss, rtol=1e-5)
    assert_near(scanned, p)


# Masks --------------------------------------------------------------------------------

MASK = {"w": True, "b": False}


@pytest.mark.parametrize(
    "link",
    [
        ox.scale_by_adahessian(),
        ox.bucketed(ox.scale_by_adahessian()),
        ox.adahessian(0.1),
    ],
    ids=["link", "bucketed", "finished optimizer"],
)
def test_a_link_behind_a_mask_asks_for_the_loss_at_the_whole_tree(link):
    tx = optax.masked(link, MASK)
    p = params()
    step = ox.make_train_step(loss_fn, tx, donate=False)
    new, _, _ = step(p, tx.init(p), X, Y)

    # By hand: the other leaf is a constant of the loss.
    def loss_of_w(w):
        return loss_fn({"w": w["w"], "b": p["b"]}, X, Y)

    w = {"w": p["w"]}
    updates, _ = link.update(
        jax.grad(loss_of_w)(w), link.init(w), w, value_fn=loss_of_w
    )
    assert_near(new["w"], p["w"] + updates["w"])


def test_partition_freezes_leaves_around_a_link_that_asks_for_the_loss():
    tx = optax.partition(
        {"train": ox.adahessian(0.1), "freeze": optax.set_to_zero()},
        {"w": "train", "b": "freeze"},
    )
    p = params()
    step = ox.make_train_step(loss_fn, tx, donate=False)
    new, _, _ = step(p, tx.init(p), X, Y)
    np.testing.assert_array_equal(new["b"], p["b"])
    assert (new["w"] != p["w"]).all() and jnp.isfinite(new["w"]).all()


def test_partition_with_gauss_newton_in_one_part_and_hutchinson_in_the_other():
    def xent(p, x, labels):
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(
            predict(p, x), labels
        )
        return jnp.mean(losses)

    tx = optax.partition(
        {
            "w": ox.sophia(0.1, estimator=ox.gauss_newton_bartlett_diag()),
            "b": ox.sophia(0.1, estimator=ox.hutchinson_diag()),
        },
        {"w": "w", "b": "b"},
    )
    p = params()
    step = ox.make_train_step(xent, tx, logits_fn=lambda p, x, y: predict(p, x))
    state = tx.init(p)
    p, state, first = step(p, state, X, LABELS)
    for _ in range(10):
        p, state, last = step(p, state, X, LABELS)
    assert last.loss < first.loss


# Errors -------------------------------------------------------------------------------


def test_missing_logits_are_named():
    tx = ox.sophia(0.1, estimator=ox.gauss_newton_bartlett_diag())
    p = params()
    step = ox.make_train_step(loss_fn, tx)
    with pytest.raises(
        ValueError,
        match=r"gauss_newton_bartlett_diag needs the extra argument 'logits_fn'.*"
        r"optax_ext\.make_train_step",
    ):
        step(p, tx.init(p), X, Y)


def test_a_loss_that_is_no_scalar_is_a_type_error():
    tx = ox.lion_k(0.1)
    p = params()
    step = ox.make_train_step(lambda p, x, y: predict(p, x) - y, tx)
    with pytest.raises(TypeError, match="scalar"):
        step(p, tx.init(p), X, Y)


# Linen --------------------------------------------------------------------------------


class Extended(TrainState):
    """A train state with a field of the user's."""

    epoch: int = 3


def train_state(tx, kind=TrainState):
    return kind.create(apply_fn=predict, params=params(), tx=tx)


def test_a_train_state_makes_the_steps_of_its_parameters():
    tx = ox.adamw_cwd(0.1)
    step = ox.make_train_step(loss_fn, tx)
    state = train_state(tx)
    p, opt_state = params(), tx.init(params())
    for t in range(1, 4):
        state, metrics = step(state, X, Y)
        p, opt_state, expected = step(p, opt_state, X, Y)
        np.testing.assert_array_equal(metrics.loss, expected.loss)
        assert int(state.step) == t
    assert_equal(state.params, p)
    assert_equal(state.opt_state, opt_state)


def test_a_train_state_gives_its_buffers_and_keeps_its_other_fields():
    tx = ox.lion_k(0.1)
    state = train_state(tx, Extended)
    old = jax.tree.leaves((state.params, state.opt_state))
    new, _ = ox.make_train_step(loss_fn, tx)(state, X, Y)
    assert all(a.is_deleted() for a in old)
    assert type(new) is Extended and new.epoch == 3
    assert new.apply_fn is predict and new.tx is tx


def test_a_train_state_is_compiled_once():
    traces = []

    def counted(p, x, y):
        traces.append(1)
        return loss_fn(p, x, y)

    tx = ox.lion_k(0.1)
    step = ox.make_train_step(counted, tx)
    state, _ = step(train_state(tx), X, Y)
    first = len(traces)
    for _ in range(2):
        state, _ = step(state, X, Y)
    assert len(traces) == first > 0


def test_linen_modules_work_as_they_are():
    model = linen.Dense(2)
    p = model.init(jax.random.key(0), X)
    tx = ox.sophia(0.05, update_interval=1)
    step = ox.make_train_step(
        lambda p, x, y: jnp.mean((model.apply(p, x) - y) ** 2), tx
    )
    state = TrainState.create(apply_fn=model.apply, params=p, tx=tx)
    state, first = step(state, X, Y)
    for _ in range(30):
        state, last = step(state, X, Y)
    assert last.loss < 0.8 * first.loss


# nnx ----------------------------------------------------------------------------------


class Layer(nnx.Module):
    """Parameters only."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        return self.linear(x)


class Block(nnx.Module):
    """Parameters, batch statistics and a random stream."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(3, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(nnx.relu(self.norm(self.linear(x)))))


def model_loss(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


def parameters(model):
    return nnx.state(model, nnx.Param)


def test_an_nnx_model_makes_the_steps_of_its_parameters():
    model, tx = Layer(nnx.Rngs(0)), ox.adamw_cwd(0.1)
    p = copy({"w": model.linear.kernel[...], "b": model.linear.bias[...]})
    step = ox.make_train_step(model_loss, tx)
    plain = ox.make_train_step(loss_fn, tx)
    opt_state, plain_state = tx.init(parameters(model)), tx.init(p)
    for _ in range(3):
        model, opt_state, metrics = step(model, opt_state, X, Y)
        p, plain_state, expected = plain(p, plain_state, X, Y)
        np.testing.assert_allclose(metrics.loss, expected.loss, rtol=1e-6)
    np.testing.assert_allclose(model.linear.kernel[...], p["w"], rtol=1e-5)
    np.testing.assert_allclose(model.linear.bias[...], p["b"], rtol=1e-5)


def test_the_model_is_updated_in_place_and_gives_its_buffers():
    model, tx = Layer(nnx.Rngs(0)), ox.lion_k(0.1)
    opt_state = tx.init(parameters(model))
    old = jax.tree.leaves((parameters(model), opt_state))
    returned, _, _ = ox.make_train_step(model_loss, tx)(model, opt_state, X, Y)
    assert returned is model
    assert all(a.is_deleted() for a in old)
    assert jnp.isfinite(model(X)).all()


def test_batch_statistics_move_once_a_step_however_often_the_loss_is_called():
    # adahessian calls the loss again, at traced parameters, for its curvature.
    for tx in (ox.lion_k(0.01), ox.adahessian(0.01)):
        model = Block(nnx.Rngs(0))
        before = model.linear(X).mean(axis=0)
        step = ox.make_train_step(model_loss, tx)
        step(model, tx.init(parameters(model)), X, Y)
        np.testing.assert_allclose(
            model.norm.mean[...], 0.1 * before, rtol=1e-5, atol=1e-7
        )


def test_dropout_draws_anew_at_every_step():
    model, tx = Block(nnx.Rngs(0)), optax.sgd(0.0)  # parameters stay
    step = ox.make_train_step(model_loss, tx)
    opt_state = tx.init(parameters(model))
    losses, counts = [], []
    for _ in range(3):
        model, opt_state, metrics = step(model, opt_state, X, Y)
        losses.append(float(metrics.loss))
        counts.append(int(model.dropout.rngs.count[...]))
    assert len(set(losses)) == 3
    assert counts == [1, 2, 3]


def test_an_nnx_model_is_compiled_once():
    traces = []

    def counted(model, x, y):
        traces.append(1)
        return model_loss(model, x, y)

    model, tx = Block(nnx.Rngs(0)), ox.sophia(0.01, update_interval=2)
    step = ox.make_train_step(counted, tx)
    opt_state = tx.init(parameters(model))
    model, opt_state, _ = step(model, opt_state, X, Y)
    first = len(traces)
    for _ in range(3):
        model, opt_state, _ = step(model, opt_state, X, Y)
    assert len(traces) == first > 0


def test_aux_and_logits_of_an_nnx_model():
    def with_aux(model, x, labels):
        logits = model(x)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(losses), logits

    model = Layer(nnx.Rngs(0))
    expected = model(X)
    tx = ox.sophia(0.05, update_interval=1, estimator=ox.gauss_newton_bartlett_diag())
    step = ox.make_train_step(
        with_aux, tx, has_aux=True, logits_fn=lambda model, x, labels: model(x)
    )
    opt_state = tx.init(parameters(model))
    model, opt_state, metrics = step(model, opt_state, X, LABELS)
    np.testing.assert_allclose(metrics.aux, expected, rtol=1e-5, atol=1e-6)


def test_per_example_gradients_of_an_nnx_model_with_parameters_only():
    class Seen(NamedTuple):
        each: Any

    def update(updates, state, params=None, **extra):
        return updates, Seen(extra["per_example_grads"])

    tx = optax.GradientTransformationExtraArgs(lambda p: Seen(None), update)
    model = Layer(nnx.Rngs(0))
    p = copy({"w": model.linear.kernel[...], "b": model.linear.bias[...]})
    step = ox.make_train_step(model_loss, tx, per_example_grads=True)
    _, seen, _ = step(model, tx.init(parameters(model)), X, Y)
    each = jax.vmap(lambda x, y: jax.grad(loss_fn)(p, x[None], y[None]))(X, Y)
    np.testing.assert_allclose(
        seen.each["linear"]["kernel"][...], each["w"], rtol=1e-5, atol=1e-6
    )


def test_per_example_gradients_refuse_other_variables_by_name():
    model, tx = Block(nnx.Rngs(0)), ox.lion_k(0.1)
    step = ox.make_train_step(model_loss, tx, per_example_grads=True)
    with pytest.raises(ValueError, match="per_example_grads=True needs") as caught:
        step(model, tx.init(parameters(model)), X, Y)
    for name in ("norm", "mean", "dropout"):
        assert name in str(caught.value)
    assert "Array" not in str(caught.value)  # names, not values


def test_masks_over_an_nnx_state():
    model = Layer(nnx.Rngs(0))
    tx = optax.masked(
        ox.adahessian(0.1), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    )
    before = copy(parameters(model))
    gradient = jax.grad(
        lambda b: jnp.mean((X @ model.linear.kernel[...] + b - Y) ** 2)
    )(model.linear.bias[...][None])[0]
    step = ox.make_train_step(model_loss, tx)
    model, _, _ = step(model, tx.init(parameters(model)), X, Y)
    moved = model.linear.bias[...] - before["linear"]["bias"][...]
    np.testing.assert_allclose(moved, gradient, rtol=1e-5)  # masked: passed through
    assert (model.linear.kernel[...] != before["linear"]["kernel"][...]).all()
