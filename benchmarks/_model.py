"""A decoder-only transformer over bytes.

Written in linen, because its parameters are a plain tree: the loss is a pure function
of them, and `optax_ext.make_train_step` takes it as it is.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import optax_ext as ox

VOCABULARY = 256


class Block(nn.Module):
    """Pre-norm causal attention, then a feed-forward layer of four times the width.

    Every kernel is a matrix, also in attention, so that methods for matrices see them.
    """

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, time, width = x.shape

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, use_bias=False, name=name)

        def heads(y: jax.Array) -> jax.Array:
            return y.reshape(batch, time, self.heads, width // self.heads)

        h = nn.RMSNorm()(x)
        query, key, value = (
            heads(dense(width, n)(h)) for n in ("query", "key", "value")
        )
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + dense(width, "mix")(mixed.reshape(x.shape))
        h = nn.RMSNorm()(x)
        h = jnp.square(nn.relu(dense(4 * width, "expand")(h)))
        return x + dense(width, "contract")(h)


class Decoder(nn.Module):
    """Bytes [batch, time] in, logits of the next byte [batch, time, 256] out."""

    width: int
    layers: int
    heads: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        shape = (tokens.shape[1], self.width)
        position = self.param("position", nn.initializers.normal(0.02), shape)
        x = nn.Embed(VOCABULARY, self.width)(tokens) + position[None]
        for _ in range(self.layers):
            x = Block(self.heads)(x)
        return nn.Dense(VOCABULARY, use_bias=False, name="head")(nn.RMSNorm()(x))


def initial_params(model: Decoder, key: jax.Array, length: int) -> optax.Params:
    """Parameters of `model` for windows of `length` bytes."""
    return model.init(key, jnp.zeros((1, length), jnp.int32))["params"]


def logits(model: Decoder, params: optax.Params, window: jax.Array) -> jax.Array:
    """Logits for every byte of `window`, [batch, length + 1], but its first."""
    return model.apply({"params": params}, window[:, :-1].astype(jnp.int32))  # pyright: ignore


def loss(model: Decoder, params: optax.Params, window: jax.Array) -> jax.Array:
    """Mean cross-entropy of the next byte, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(
        logits(model, params, window), window[:, 1:].astype(jnp.int32)
    ).mean()


def layers(model: Decoder, length: int) -> Any:
    """Its layers as `optax_ext.training.flax_layers` names them."""
    params = jax.eval_shape(
        lambda key: initial_params(model, key, length), jax.random.key(0)
    )
    window = jax.ShapeDtypeStruct((1, length + 1), jnp.uint8)
    return ox.training.flax_layers(
        lambda p, window: loss(model, p, window), params, window
    )


def layer_inputs(model: Decoder, params: optax.Params, window: jax.Array) -> Any:
    """Rows that met each kernel, a tree like `params`; no rows for other leaves."""
    rows = {}

    def note(call, args, kwargs, context):
        if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
            rows[context.module.path] = args[0].reshape(-1, args[0].shape[-1])
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        logits(model, params, window)

    def of_leaf(path, leaf):
        layer = tuple(key.key for key in path[:-1])
        return rows.get(layer, jnp.zeros((0, 0), leaf.dtype))

    return jax.tree_util.tree_map_with_path(of_leaf, params)


def extra_args(model: Decoder, needs: Iterable[str]) -> dict[str, Callable[..., Any]]:
    """Functions of (params, window) for the extra arguments among `needs`."""

    def auxiliary(params, window):  # keeps the logits' scale, as language models do
        return jnp.mean(jax.nn.logsumexp(logits(model, params, window), axis=-1) ** 2)

    def gradient(params, window):
        return jax.grad(loss, argnums=1)(model, params, window)

    def error_mass(params, window):
        log_probs = jax.nn.log_softmax(logits(model, params, window))
        labels = window[:, 1:, None].astype(jnp.int32)
        return -jnp.mean(jnp.expm1(jnp.take_along_axis(log_probs, labels, axis=-1)))

    def statistic(name):
        def of(params, window):
            found = layers(model, window.shape[1] - 1)
            values = ox.training.layer_statistics(functools.partial(loss, model), found)
            return values(params, window)[2][name]

        return of

    def logits_grad(params, window):
        def of(z):
            return optax.softmax_cross_entropy_with_integer_labels(
                z, window[:, 1:].astype(jnp.int32)
            ).mean()

        return jax.grad(of)(logits(model, params, window))

    known = {
        "activations": statistic("activations"),
        "preact_grads": statistic("preact_grads"),
        "inputs": functools.partial(layer_inputs, model),
        "logits_grad": logits_grad,
        "aux_grads": jax.grad(auxiliary),
        "aux_value_fn": lambda params, window: -loss(model, params, window),
        # A cheaper proxy: a quarter of the batch.
        "proxy_value_fn": lambda params, window: loss(
            model, params, window[: max(1, window.shape[0] // 4)]
        ),
        "error_mass": error_mass,
        # No subspace to keep: every leaf as it is.
        "bases": lambda params, window: jax.tree.map(lambda _: None, params),
        # The empirical Fisher of the batch.
        "hessian_diag": lambda params, window: jax.tree.map(
            jnp.square, gradient(params, window)
        ),
    }
    return {name: known[name] for name in needs if name in known}
