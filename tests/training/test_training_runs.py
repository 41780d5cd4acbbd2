"""Small real models learn through `make_train_step`: plain trees, linen and nnx."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import optax_ext as ox
from tests.training.conftest import cross_entropy

STEPS = 200


def sophia_g():
    return ox.sophia(
        optax.cosine_decay_schedule(6e-3, STEPS),
        gamma=0.05,
        estimator=ox.gauss_newton_bartlett_diag(),
    )


def flagship():
    """The chain of the design, word for word, where optax needs it in float32."""
    return ox.full_precision(
        optax.chain(
            ox.cautious(
                optax.chain(
                    optax.scale_by_lion(b1=0.95, b2=0.98),
                    ox.precondition_by_hessian_diag(
                        ox.gauss_newton_bartlett_diag(), gamma=0.05, update_interval=10
                    ),
                    optax.clip(1.0),
                )
            ),
            ox.add_cautious_decayed_weights(0.1),
            optax.scale_by_learning_rate(optax.cosine_decay_schedule(6e-3, STEPS)),
        )
    )


optimizers = pytest.mark.parametrize(
    "make", [sophia_g, flagship], ids=lambda m: m.__name__
)


def assert_learned(text, before, after, seen):
    """Held-out loss far below its start and below what the window does not tell."""
    assert before > 4.5  # near log(128) = 4.85 nats: it knew nothing
    assert after < text.unigram - 0.5
    assert np.mean(seen[-20:]) < 0.6 * np.mean(seen[:5])
    assert np.isfinite(seen).all()


@optimizers
def test_a_plain_tree_learns_to_predict_bytes(make, text, linen_bytes):
    def logits_fn(params, x, y):
        return linen_bytes.apply(params, x)

    def loss_fn(params, x, y):
        return cross_entropy(logits_fn(params, x, y), y)

    tx = make()
    params = linen_bytes.init(jax.random.key(0), text.held[0][:1])
    opt_state = tx.init(params)
    step = ox.make_train_step(loss_fn, tx, logits_fn=logits_fn)
    before, seen = float(loss_fn(params, *text.held)), []
    for batch in text.batches(STEPS):
        params, opt_state, metrics = step(params, opt_state, *batch)
        seen.append(float(metrics.loss))
    assert_learned(text, before, float(loss_fn(params, *text.held)), seen)


@optimizers
def test_a_linen_train_state_learns_to_predict_bytes(make, text, linen_bytes):
    def logits_fn(params, x, y):
        return linen_bytes.apply({"params": params}, x)

    def loss_fn(params, x, y):
        return cross_entropy(logits_fn(params, x, y), y)

    tx = make()
    state = TrainState.create(
        apply_fn=linen_bytes.apply,
        params=linen_bytes.init(jax.random.key(0), text.held[0][:1])["params"],
        tx=tx,
    )
    step = ox.make_train_step(loss_fn, tx, logits_fn=logits_fn)
    before, seen = float(loss_fn(state.params, *text.held)), []
    for batch in text.batches(STEPS):
        state, metrics = step(state, *batch)
        seen.append(float(metrics.loss))
    assert int(state.step) == STEPS
    assert_learned(text, before, float(loss_fn(state.params, *text.held)), seen)


@optimizers
def test_an_nnx_model_learns_to_predict_bytes(make, text, nnx_bytes):
    model = nnx_bytes

    def loss_fn(model, x, y):
        return cross_entropy(model(x), y)

    def evaluate():
        model.eval()
        loss = float(loss_fn(model, *text.held))
        model.train()
        return loss

    tx = make()
    opt_state = tx.init(nnx.state(model, nnx.Param))
    step = ox.make_train_step(loss_fn, tx, logits_fn=lambda model, x, y: model(x))
    before, seen = evaluate(), []
    for batch in text.batches(STEPS):
        model, opt_state, metrics = step(model, opt_state, *batch)
        seen.append(float(metrics.loss))
    assert_learned(text, before, evaluate(), seen)
