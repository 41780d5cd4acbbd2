"""Diffusion of scikit-learn's 8x8 digits: a small network, a sampler, and metrics.

The digits come with scikit-learn and need no download. A network predicts the noise or
v, and a method is told by two indices, so that all runs share one compiled program.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets

import optax_ext as ox

PIXELS = 64
LOGSNR_LIMIT = 10.0
BATCH, WIDTH = 64, 128
_START = 2 / math.pi * math.atan(math.exp(-LOGSNR_LIMIT / 2))
NETWORKS = ("eps", "v")
_FREQUENCIES = np.array([0.1, 0.2, 0.4, 0.8], np.float32)

Params = Any  # a list of (kernel, bias), one a layer
WeightingFn = Callable[[jax.Array], jax.Array]


class Digits(NamedTuple):
    """Disjoint parts of the digits, with pixels in [-1, 1].

    Attributes:
      train: for training, [1100, 64].
      labels: what they are, [1100].
      tune: for the choice of learning rates, [197, 64].
      test: for what is reported, [500, 64].
      test_labels: what they are, [500].
    """

    train: np.ndarray
    labels: np.ndarray
    tune: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray


def load() -> Digits:
    """The digits, split once and for all."""
    pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(pixels))
    pixels = (pixels[order] / 8 - 1).astype(np.float32)
    labels = labels[order]
    return Digits(
        pixels[:1100], labels[:1100], pixels[1100:1297], pixels[1297:], labels[1297:]
    )


def _times_plain_eps(weight_of: Callable[..., jax.Array]) -> WeightingFn:
    """A weight of the plain eps loss on the cosine schedule, per unit of log-SNR."""
    plain = ox.losses.diffusion_weighting("iddpm")
    return lambda logsnr: plain(logsnr) * weight_of(jnp.exp(logsnr))


# Weights per unit of log-SNR. Those of the first two papers come with the noise levels
# of the cosine schedule; the third paper draws levels adaptively for all it compares.
WEIGHTINGS: dict[str, WeightingFn] = {
    "eps": ox.losses.diffusion_weighting("iddpm"),
    "p2": _times_plain_eps(ox.losses.p2_diffusion_weight),
    "debiased": _times_plain_eps(ox.losses.debiased_diffusion_weight),
    "elbo": ox.losses.diffusion_weighting("elbo"),
    "eps_adaptive": ox.losses.diffusion_weighting("iddpm"),
    "v_adaptive": ox.losses.diffusion_weighting("v_cosine"),
    "sigmoid_adaptive": ox.losses.diffusion_weighting("sigmoid"),
    "elbo_adaptive": ox.losses.diffusion_weighting("elbo"),
}


class Method(NamedTuple):
    """A network and a weighting.

    Attributes:
      network: place in `NETWORKS` of what the network puts out.
      weighting: place in `WEIGHTINGS` of what it is trained with.
    """

    network: int
    weighting: int


_ADAPTIVE = np.array([name.endswith("adaptive") for name in WEIGHTINGS])
_NOISE_LEVELS = ox.adaptive_noise_schedule(
    num_bins=50, logsnr_min=-LOGSNR_LIMIT, logsnr_max=LOGSNR_LIMIT, decay=0.98
)


def logsnr_at(t: jax.Array) -> jax.Array:
    """The cosine schedule, cut to log-SNRs that differ from the data and from noise."""
    return -2 * jnp.log(jnp.tan(jnp.pi / 2 * (_START + (1 - 2 * _START) * t)))


def _scales(logsnr: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Signal alpha and noise sigma, to multiply images with."""
    signal, noise = jax.nn.sigmoid(logsnr), jax.nn.sigmoid(-logsnr)
    return jnp.sqrt(signal)[:, None], jnp.sqrt(noise)[:, None]


def predict_noise(params: Params, method: Method, z, logsnr) -> jax.Array:
    """The network: noisy images [count, 64] and log-SNRs [count] -> noise."""
    angles = logsnr[:, None] * _FREQUENCIES
    features = [z, logsnr[:, None] / 10, jnp.sin(angles), jnp.cos(angles)]
    hidden = _layer(params[0], jnp.concatenate(features, -1))
    for each in params[1:-1]:
        hidden = hidden + _layer(each, jax.nn.silu(hidden))
    output = _layer(params[-1], jax.nn.silu(hidden))
    alpha, sigma = _scales(logsnr)
    return jnp.where(method.network == 0, output, alpha * output + sigma * z)


def _layer(layer: tuple[jax.Array, jax.Array], x: jax.Array) -> jax.Array:
    return x @ layer[0] + layer[1]


def _init(key: jax.Array, sizes: tuple[int, ...]) -> Params:
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        (jax.random.normal(k, (n_in, n_out)) / n_in**0.5, jnp.zeros(n_out))
        for k, n_in, n_out in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def _weighting(method: Method) -> WeightingFn:
    """The weighting of a method whose indices are traced."""

    def weight(logsnr: jax.Array) -> jax.Array:
        return jnp.stack([w(logsnr) for w in WEIGHTINGS.values()])[method.weighting]

    return weight


def _stratified(key: jax.Array, count: int) -> jax.Array:
    return (jnp.arange(count) + jax.random.uniform(key, (count,))) / count


def _eps_losses(params: Params, method, x, noise, logsnr, weighting) -> jax.Array:
    """w(lambda) |eps err|^2 of every image."""
    alpha, sigma = _scales(logsnr)
    pred = predict_noise(params, method, alpha * x + sigma * noise, logsnr)
    return 2 * ox.losses.weighted_diffusion_loss(
        pred, noise, logsnr, -1.0, weighting=weighting
    )


@functools.partial(jax.jit, static_argnames="steps")
@functools.partial(jax.vmap, in_axes=(0, 0, None, None, None))
def train(key, rate, method: Method, images, steps: int) -> Params:
    """Parameters after training; one run a key and a peak learning rate."""
    key, init_key = jax.random.split(key)
    sizes = (PIXELS + 1 + 2 * len(_FREQUENCIES), *(3 * [WIDTH]), PIXELS)
    params = _init(init_key, sizes)
    tx = optax.adam(optax.warmup_cosine_decay_schedule(0.0, 1.0, steps // 20, steps))

    weighting = _weighting(method)

    def loss_fn(params, levels, key):
        index_key, noise_key, time_key = jax.random.split(key, 3)
        x = images[jax.random.randint(index_key, (BATCH,), 0, len(images))]
        noise = jax.random.normal(noise_key, x.shape)
        t = _stratified(time_key, BATCH)
        cosine, slope = jax.jvp(logsnr_at, (t,), (jnp.ones_like(t),))
        adaptive = jnp.asarray(_ADAPTIVE)[method.weighting]
        drawn = _NOISE_LEVELS.quantile(levels, t)
        logsnr = jnp.where(adaptive, drawn, cosine)
        losses = _eps_losses(params, method, x, noise, logsnr, weighting)
        weights, levels = _NOISE_LEVELS.update(losses, levels, logsnr=logsnr)
        return jnp.mean(jnp.where(adaptive, weights, -slope) * losses / 2), levels

    def step(carry, key):
        params, levels, state = carry
        grads, levels = jax.grad(loss_fn, has_aux=True)(params, levels, key)
        updates, state = tx.update(grads, state)
        updates = optax.tree.scale(rate, updates)
        return (optax.apply_updates(params, updates), levels, state), None

    carry = (params, _NOISE_LEVELS.init(), tx.init(params))
    (params, _, _), _ = jax.lax.scan(step, carry, jax.random.split(key, steps))
    return params


@functools.partial(jax.jit, static_argnames="draws")
@functools.partial(jax.vmap, in_axes=(0, None, None, None, None))
def held_out(
    params, method: Method, images, key, draws: int
) -> tuple[jax.Array, jax.Array]:
    """The weighted loss and the likelihood bound, on images, in nats a pixel.

    The bound is its diffusion part, the only one that the network has a say in.
    """

    def both(key):
        noise_key, time_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, images.shape)
        t = _stratified(time_key, len(images))
        logsnr, slope = jax.jvp(logsnr_at, (t,), (jnp.ones_like(t),))
        losses = _eps_losses(params, method, images, noise, logsnr, "elbo")
        bound = -slope * losses / 2 / PIXELS
        return jnp.mean(_weighting(method)(logsnr) * bound), jnp.mean(bound)

    own, bound = jax.lax.map(both, jax.random.split(key, draws))
    return jnp.mean(own), jnp.mean(bound)


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, None, None, None, None))
def error_by_level(params, method: Method, images, logsnrs, key) -> jax.Array:
    """Mean squared error of the noise a pixel, at each log-SNR."""

    def at_level(logsnr):
        noise = jax.random.normal(key, images.shape)
        rows = jnp.broadcast_to(logsnr, (len(images),))
        losses = _eps_losses(params, method, images, noise, rows, "elbo")
        return jnp.mean(losses) / PIXELS

    return jax.lax.map(at_level, logsnrs)


@functools.partial(jax.jit, static_argnames=("count", "steps"))
@functools.partial(jax.vmap, in_axes=(0, None, 0, None, None))
def draw_samples(params, method: Method, key, count: int, steps: int) -> jax.Array:
    """Images [count, 64] by ancestral sampling, with estimates kept in [-1, 1]."""
    grid = logsnr_at(jnp.linspace(1.0, 0.0, steps + 1))

    def step(z, at):
        before, after, key = at
        rows, next_rows = (jnp.broadcast_to(x, (count,)) for x in (before, after))
        alpha, sigma = _scales(rows)
        next_alpha, next_sigma = _scales(next_rows)
        estimate = (z - sigma * predict_noise(params, method, z, rows)) / alpha
        estimate = jnp.clip(estimate, -1.0, 1.0)
        # q(next z | z, x) forgets a share of z for x: 1 - snr / next snr.
        forgotten = -jnp.expm1(before - after)
        mean = next_alpha * ((1 - forgotten) * z / alpha + forgotten * estimate)
        noise = jax.random.normal(key, z.shape)
        return mean + next_sigma * jnp.sqrt(forgotten) * noise, estimate

    start_key, key = jax.random.split(key)
    z = jax.random.normal(start_key, (count, PIXELS))
    _, estimates = jax.lax.scan(
        step, z, (grid[:-1], grid[1:], jax.random.split(key, steps))
    )
    return estimates[-1]


class Features(NamedTuple):
    """What a small classifier makes of images.

    Attributes:
      of: images [count, 64] -> features [count, 32].
      accuracy: share of the held-out digits that the classifier gets right.
    """

    of: Callable[[Any], np.ndarray]
    accuracy: float


def classifier(digits: Digits, steps: int) -> Features:
    """Trains a classifier on the training digits, for its last hidden layer."""
    tx = optax.adam(1e-3)

    @jax.jit
    def features(params: Params, x: Any) -> jax.Array:
        for layer in params[:-1]:
            x = jax.nn.relu(_layer(layer, x))
        return x

    def step(carry, key):
        params, state = carry
        rows = jax.random.randint(key, (BATCH,), 0, len(digits.train))
        x, y = jnp.asarray(digits.train)[rows], jnp.asarray(digits.labels)[rows]

        def loss_fn(params):
            logits = _layer(params[-1], features(params, x))
            return optax.losses.softmax_cross_entropy_with_integer_labels(
                logits, y
            ).mean()

        updates, state = tx.update(jax.grad(loss_fn)(params), state)
        return (optax.apply_updates(params, updates), state), None

    init_key, key = jax.random.split(jax.random.key(0))
    start = _init(init_key, (PIXELS, 128, 32, 10))
    carry = (start, tx.init(start))
    carry, _ = jax.lax.scan(step, carry, jax.random.split(key, steps))
    params: Params = carry[0]
    logits = _layer(params[-1], features(params, digits.test))
    right = np.mean(np.argmax(logits, -1) == digits.test_labels)
    return Features(lambda x: np.asarray(features(params, x), np.float64), float(right))


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Frechet distance of the Gaussians through two clouds of features."""
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.maximum(np.linalg.eigvals(cov_a @ cov_b).real, 0)).sum()
    means = np.sum((a.mean(0) - b.mean(0)) ** 2)
    return float(means + np.trace(cov_a) + np.trace(cov_b) - 2 * root)


def sliced_distance(a: np.ndarray, b: np.ndarray, projections: int = 256) -> float:
    """Root mean squared Wasserstein-2 distance of random projections, same counts."""
    directions = np.random.default_rng(0).normal(size=(a.shape[1], projections))
    directions /= np.linalg.norm(directions, axis=0)
    gaps = np.sort(a @ directions, 0) - np.sort(b @ directions, 0)
    return float(np.sqrt(np.mean(gaps**2)))
