"""Statistics of layers out of the one backward pass, for linen and nnx."""

# pyright: reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import optax_ext as ox

LAYERS = {
    "conv": ("conv/kernel", "conv/bias"),
    "hidden": ("hidden/kernel", None),
    "head": ("head/kernel", "head/bias"),
}


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, images):
        x = linen.Conv(3, (2, 2), 2, padding="VALID", name="conv")(images)
        x = jnp.tanh(x).reshape(len(x), -1)
        x = jnp.tanh(linen.Dense(5, use_bias=False, name="hidden")(x))
        return linen.Dense(2, name="head")(x)


class NnxNet(nnx.Module):
    def __init__(self, params):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(1, 3, (2, 2), 2, padding="VALID", rngs=rngs)
        self.hidden = nnx.Linear(12, 5, use_bias=False, rngs=rngs)
        self.head = nnx.Linear(5, 2, rngs=rngs)
        self.calls = nnx.BatchStat(jnp.zeros((), jnp.int32))
        for name, leaves in params.items():
            for leaf, value in leaves.items():
                getattr(getattr(self, name), leaf)[...] = value

    def __call__(self, images):
        self.calls[...] += 1
        x = jnp.tanh(self.conv(images)).reshape(len(images), -1)
        return self.head(jnp.tanh(self.hidden(x)))


IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4, 4, 1)), jnp.float32)
LABELS = jnp.asarray([0, 1, 1, 0, 1, 0])
PARAMS = LinenNet().init(jax.random.key(1), IMAGES)["params"]


def cross_entropy(logits):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)
    return jnp.mean(losses)


def linen_loss(params, images):
    return cross_entropy(LinenNet().apply({"params": params}, images))


def nnx_loss(model, images):
    return cross_entropy(model(images))


FRAMEWORKS = {
    "linen": (linen_loss, lambda: PARAMS),
    "nnx": (nnx_loss, lambda: NnxNet(PARAMS)),
}
EACH = pytest.mark.parametrize("framework", FRAMEWORKS)


def by_hand():
    """Mean inputs, and gradients of the outputs, of the layers written out."""
    rows = np.asarray(
        [
            IMAGES[b, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, 0].ravel()
            for b in range(6)
            for i in range(2)
            for j in range(2)
        ]
    )
    p = jax.tree.map(np.asarray, PARAMS)
    c = np.tanh(rows @ p["conv"]["kernel"].reshape(4, 3) + p["conv"]["bias"][None])
    x = c.reshape(6, 12)
    h = np.tanh(x @ p["hidden"]["kernel"])
    z = h @ p["head"]["kernel"] + p["head"]["bias"][None]
    e = np.exp(z - z.max(1, keepdims=True))
    dz = (e / e.sum(1, keepdims=True) - np.eye(2)[LABELS]) / 6
    dh = (dz @ p["head"]["kernel"].T) * (1 - h**2)
    dc = (dh @ p["hidden"]["kernel"].T).reshape(-1, 3) * (1 - c**2)
    inputs = {"conv": rows, "hidden": x, "head": h}
    outputs = {"conv": dc, "hidden": dh, "head": dz}
    return (
        {name: rows.mean(0) for name, rows in inputs.items()},
        {name: rows.sum(0) for name, rows in outputs.items()},
        {"hidden": x.T @ dh, "head": h.T @ dz},
    )


@EACH
def test_the_layers_of_a_model_are_found_with_their_paths(framework):
    loss_fn, make = FRAMEWORKS[framework]
    assert ox.training.flax_layers(loss_fn, make(), IMAGES) == LAYERS


@EACH
def test_statistics_and_gradients_are_those_derived_by_hand(framework):
    loss_fn, make = FRAMEWORKS[framework]
    statistics = ox.training.layer_statistics(loss_fn, LAYERS)
    loss, grads, extra = statistics(make(), IMAGES)
    inputs, outputs, kernels = by_hand()
    np.testing.assert_allclose(loss, linen_loss(PARAMS, IMAGES), rtol=1e-6)
    for name in LAYERS:
        # Sums of some tens of numbers of order 1.
        got = extra["activations"][name], extra["preact_grads"][name]
        np.testing.assert_allclose(got[0], inputs[name], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(got[1], outputs[name], rtol=1e-4, atol=1e-6)
    for name, want in kernels.items():
        got = grads[name]["kernel"][...]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    bias = grads["conv"]["bias"][...]
    np.testing.assert_allclose(bias, extra["preact_grads"]["conv"], rtol=1e-5)


@EACH
def test_a_real_model_trains_with_mkor(framework):
    loss_fn, make = FRAMEWORKS[framework]
    model = make()
    layers = ox.training.flax_layers(loss_fn, model, IMAGES)
    tx = optax.chain(
        ox.scale_by_mkor(layers, update_interval=2, variant="exact"), optax.scale(-0.3)
    )
    statistics = ox.training.layer_statistics(loss_fn, layers)
    params = nnx.state(model, nnx.Param) if framework == "nnx" else model
    state, losses = tx.init(params), []

    @jax.jit
    def apply(params, grads, state, extra):
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    measure = statistics if framework == "nnx" else jax.jit(statistics)
    for _ in range(12):
        loss, grads, extra = measure(model, IMAGES)
        params, state = apply(params, grads, state, extra)
        losses.append(float(loss))
        if framework == "nnx":
            nnx.update(model, params)
        else:
            model = params
    assert losses[-1] < losses[0] / 2
    if framework == "nnx":
        assert model.calls[...] == 12  # other variables move on, too


def test_loss_and_gradients_are_computed_once_each():
    calls = {"forward": 0, "backward": 0}

    @jax.custom_vjp
    def counted(x):
        return x

    def forward(x):
        jax.debug.callback(lambda: calls.update(forward=calls["forward"] + 1))
        return x, None

    def backward(_, dx):
        jax.debug.callback(lambda: calls.update(backward=calls["backward"] + 1))
        return (dx,)

    counted.defvjp(forward, backward)
    statistics = ox.training.layer_statistics(
        lambda p, x: counted(linen_loss(p, x)), LAYERS
    )
    jax.block_until_ready(jax.jit(statistics)(PARAMS, IMAGES))
    jax.effects_barrier()
    assert calls == {"forward": 1, "backward": 1}


def test_checkpoint_scan_and_vmap_around_the_model_change_nothing():
    def logits(params, images):
        return LinenNet().apply({"params": params}, images)

    def mapped(params, images):
        each = jax.vmap(lambda image: logits(params, image[None])[0])(images)
        return cross_entropy(each)

    def scanned(params, images):
        def body(carry, half):
            return carry, logits(params, half)

        _, halves = jax.lax.scan(body, 0, images.reshape(2, 3, *images.shape[1:]))
        return cross_entropy(halves.reshape(6, 2))

    def remat(params, images):
        return cross_entropy(jax.checkpoint(logits)(params, images))

    inputs, outputs, _ = by_hand()
    for loss_fn in (mapped, scanned, remat):
        _, _, extra = ox.training.layer_statistics(loss_fn, LAYERS)(PARAMS, IMAGES)
        for name in LAYERS:
            for key, want in (("activations", inputs), ("preact_grads", outputs)):
                np.testing.assert_allclose(
                    extra[key][name], want[name], rtol=1e-4, atol=1e-6
                )


def test_some_layers_an_auxiliary_value_and_layers_that_the_loss_leaves_out():
    def loss_fn(params, images):
        z = LinenNet().apply({"params": params}, images)
        return jnp.sum(params["head"]["bias"]), z

    some = {name: LAYERS[name] for name in ("head", "hidden")}
    statistics = ox.training.layer_statistics(loss_fn, some, has_aux=True)
    (loss, logits), _, extra = statistics(PARAMS, IMAGES)
    assert loss == 0.0
    assert logits.shape == (6, 2)
    assert extra["activations"].keys() == some.keys()
    assert not extra["preact_grads"]["head"].any()
    assert not extra["activations"]["hidden"].any()


def test_16_bit_models_have_float32_statistics():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    statistics = ox.training.layer_statistics(linen_loss, LAYERS)
    _, _, extra = statistics(params, IMAGES.astype(jnp.bfloat16))
    assert {x.dtype for x in jax.tree.leaves(extra)} == {jnp.dtype(jnp.float32)}


def test_a_layer_that_is_not_there_is_named():
    statistics = ox.training.layer_statistics(linen_loss, {"a": ("a/kernel", None)})
    with pytest.raises(ValueError, match="layer_statistics: no leaf has the path 'a/k"):
        statistics(PARAMS, IMAGES)
