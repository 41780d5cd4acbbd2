"""A small flow-matching policy: 2-D data, a velocity network, an SDE sampler, rewards.

The data are four Gaussians. The proxy reward, which training sees, is highest off the
data; the gold metrics, which it never sees, say how far samples are from the data.
Everything is float32.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_ext as ox

CENTRES = np.array([(2, 0), (-2, 0), (0, 2), (0, -2)], np.float32)
SPREAD = 0.25  # standard deviation of each Gaussian
TARGET = np.array((3, 0), np.float32)  # four standard deviations off the data
DIMENSIONS = 2
NOISE_LEVEL = 0.7
STEPS = 10
_u = np.linspace(1, 0, STEPS + 1)
GRID = (3 * _u / (1 + 2 * _u)).astype(np.float32)
DTS = -np.diff(GRID)
_WIDTH, _BATCH, _PEAK_RATE = 32, 512, 4e-3

Params = Any  # a list of (kernel, bias), one a layer


class Trajectories(NamedTuple):
    """What a policy did, and what is needed to score that again.

    Attributes:
      inputs: samples before each step, [count, steps, 2].
      samples: samples after each step, of the same shape.
      means: their means under the policy that drew them, of the same shape.
      log_probs: their log-probabilities under it, [count, steps].
      std_devs: sigma_k, [steps]; the same for every policy.
    """

    inputs: jax.Array
    samples: jax.Array
    means: jax.Array
    log_probs: jax.Array
    std_devs: jax.Array


def draw_data(key: jax.Array, count: int) -> jax.Array:
    """Samples of the data, [count, 2]."""
    which, noise = jax.random.split(key)
    centres = jax.random.choice(which, CENTRES, (count,))
    return centres + SPREAD * jax.random.normal(noise, (count, DIMENSIONS))


def velocity(params: Params, x: jax.Array, sigma: jax.Array) -> jax.Array:
    """The network's velocity at samples [count, 2], for a scalar sigma or [count]."""
    time = jnp.broadcast_to(sigma, x.shape[:1])[:, None]
    features = [x, time, jnp.cos(jnp.pi * time), jnp.sin(jnp.pi * time)]
    hidden = jnp.concatenate(features, -1)
    for kernel, bias in params[:-1]:
        hidden = jnp.tanh(hidden @ kernel + bias[None])
    kernel, bias = params[-1]
    return hidden @ kernel + bias[None]


@functools.partial(jax.jit, static_argnames="steps")
def pretrain(key: jax.Array, steps: int) -> Params:
    """Parameters after flow matching: regression of the velocity on noise - data."""
    init_key, key = jax.random.split(key)
    sizes = (DIMENSIONS + 3, _WIDTH, _WIDTH, DIMENSIONS)
    params = [
        (jax.random.normal(k, (n_in, n_out)) / n_in**0.5, jnp.zeros(n_out))
        for k, n_in, n_out in zip(
            jax.random.split(init_key, 3), sizes[:-1], sizes[1:], strict=True
        )
    ]
    tx = optax.adam(optax.cosine_decay_schedule(_PEAK_RATE, steps))

    def loss_fn(params: Params, key: jax.Array) -> jax.Array:
        data_key, noise_key, sigma_key = jax.random.split(key, 3)
        data = draw_data(data_key, _BATCH)
        noise = jax.random.normal(noise_key, data.shape)
        sigma = jax.random.uniform(sigma_key, (_BATCH,))
        x = (1 - sigma[:, None]) * data + sigma[:, None] * noise
        return optax.l2_loss(velocity(params, x, sigma), noise - data).mean()

    def step(carry, key):
        params, state = carry
        updates, state = tx.update(jax.grad(loss_fn)(params, key), state)
        return (optax.apply_updates(params, updates), state), None

    carry = (params, tx.init(params))
    (params, _), _ = jax.lax.scan(step, carry, jax.random.split(key, steps))
    return params


@jax.jit
def perturb(params: Params, key: jax.Array, scale: float) -> Params:
    """Parameters with N(0, scale^2) added to every one."""
    noise = optax.tree.random_like(key, params, jax.random.normal)
    return optax.tree.add_scale(params, scale, noise)


def _sde_step(params: Params, x, sigma, next_sigma, noise):
    return ox.losses.flow_sde_step(
        velocity(params, x, sigma),
        x,
        sigma,
        next_sigma,
        GRID[1],
        noise,
        noise_level=NOISE_LEVEL,
    )


def rollout(params: Params, key: jax.Array, count: int) -> Trajectories:
    """Denoises `count` samples of standard normal noise."""

    def step(x, at):
        sigma, next_sigma, key = at
        noise = jax.random.normal(key, x.shape)
        after, log_prob, mean, std_dev = _sde_step(params, x, sigma, next_sigma, noise)
        return after, (x, after, mean, log_prob, std_dev)

    start_key, key = jax.random.split(key)
    start = jax.random.normal(start_key, (count, DIMENSIONS))
    steps = (GRID[:-1], GRID[1:], jax.random.split(key, STEPS))
    _, stored = jax.lax.scan(step, start, steps)
    inputs, samples, means, log_probs, std_devs = stored
    inputs, samples, means = (jnp.swapaxes(x, 0, 1) for x in (inputs, samples, means))
    return Trajectories(inputs, samples, means, log_probs.T, std_devs)


@functools.partial(jax.jit, static_argnames="count")
def final_samples(params: Params, key: jax.Array, count: int) -> jax.Array:
    """What the policy draws in the end, [count, 2]."""
    return rollout(params, key, count).samples[:, -1]


def step_means(params: Params, inputs: jax.Array) -> jax.Array:
    """Means of the steps that a policy would take from stored `inputs`."""

    def one_step(x, sigma, next_sigma):
        return _sde_step(params, x, sigma, next_sigma, jnp.zeros_like(x))[2]

    return jax.vmap(one_step, (1, 0, 0), 1)(inputs, GRID[:-1], GRID[1:])


def log_ratios(
    old: Trajectories, means: jax.Array, samples: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Raw and normalised log-ratios of `samples`, the new policy having `means`."""
    std = old.std_devs * jnp.sqrt(DTS)
    log_probs, old_log_probs = (
        ox.losses.gaussian_step_log_prob(samples, m, std, event_ndim=1)
        for m in (means, old.means)
    )
    normalized = ox.losses.normalized_log_ratio(
        log_probs, old_log_probs, means, old.means, old.std_devs, DTS
    )
    return log_probs - old_log_probs, normalized


@functools.partial(jax.jit, static_argnames=("pairs", "chunk"))
def measure_ratios(
    old: Params, new: Params, key: jax.Array, *, pairs: int, chunk: int
) -> dict[str, dict[str, jax.Array]]:
    """Moments of the ratio at every step under the old policy, in chunks.

    Every step of a trajectory is taken with its noise and with the noise negated. The
    half sum of both ratios has the mean of the ratio, and a far smaller variance.

    Returns:
      For the "raw" and the "normalized" ratio, arrays [chunks, steps] of means over a
      chunk: of the ratio less 1, of the law's value less 1, of squares.
    """

    def one_chunk(key):
        trajectories = rollout(old, key, chunk)
        means = step_means(new, trajectories.inputs)
        mirrored = 2 * trajectories.means - trajectories.samples
        plus = log_ratios(trajectories, means, trajectories.samples)
        minus = log_ratios(trajectories, means, mirrored)
        distance = jnp.sum((means - trajectories.means) ** 2, -1)
        std = trajectories.std_devs * jnp.sqrt(DTS)
        kl = distance / (2 * std[None] ** 2)
        laws = (
            jnp.expm1(-kl / DIMENSIONS + kl / DIMENSIONS**2),
            jnp.expm1(distance / (2 * DIMENSIONS**2)),
        )
        return {
            name: _moments(jnp.expm1(p), jnp.expm1(m), law)
            for name, p, m, law in zip(
                ("raw", "normalized"), plus, minus, laws, strict=True
            )
        }

    return jax.lax.map(one_chunk, jax.random.split(key, pairs // chunk))


def _moments(plus: jax.Array, minus: jax.Array, law: jax.Array) -> dict:
    half_sum = (plus + minus) / 2
    moments = {
        "mean": half_sum,
        "mean_square": half_sum**2,
        "law": law,
        "gap": half_sum - law,
        "gap_square": (half_sum - law) ** 2,
        "ratio_square": (plus**2 + minus**2) / 2,
    }
    return {name: x.mean(0) for name, x in moments.items()}


def proxy_reward(x: jax.Array) -> jax.Array:
    """What training sees: minus the distance to `TARGET`."""
    return -jnp.linalg.norm(x - TARGET[None], axis=-1)


def distance_to_data(x: jax.Array) -> jax.Array:
    """Gold metric: distance to the nearest centre of the data."""
    return jnp.linalg.norm(x[:, None] - CENTRES[None], axis=-1).min(-1)


def data_log_likelihood(x: jax.Array) -> jax.Array:
    """Gold metric: log-density of the data, in nats."""
    square = jnp.sum((x[:, None] - CENTRES[None]) ** 2, -1)
    log_density = -square / (2 * SPREAD**2) - np.log(2 * np.pi * SPREAD**2)
    return jax.nn.logsumexp(log_density, -1) - np.log(len(CENTRES))


METRICS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "proxy": proxy_reward,
    "distance": distance_to_data,
    "log_likelihood": data_log_likelihood,
}


class Method(NamedTuple):
    """How to train: GRPO-Guard, or Flow-GRPO's plain clip."""

    guard: bool
    clip_range: float


@functools.partial(
    jax.jit, static_argnames=("method", "iterations", "epochs", "count", "held_out")
)
def fine_tune(
    params: Params,
    key: jax.Array,
    learning_rate: float,
    *,
    method: Method,
    iterations: int,
    epochs: int,
    count: int,
    held_out: int,
) -> tuple[Params, dict[str, jax.Array], dict[str, jax.Array]]:
    """Fine-tunes a policy on the proxy reward.

    Returns:
      The parameters; the metrics on `held_out` samples before every iteration and at
      the end, [iterations + 1]; mean and mean square of the ratio less 1, and the
      fraction of positive-advantage samples clipped, [iterations, epochs, steps].
    """
    tx = optax.adam(learning_rate)

    def loss_fn(params, old: Trajectories, advantages):
        means = step_means(params, old.inputs)
        std = old.std_devs * jnp.sqrt(DTS)
        log_probs = ox.losses.gaussian_step_log_prob(
            old.samples, means, std, event_ndim=1
        )
        losses = ox.losses.grpo_guard_loss(
            log_probs,
            old.log_probs,
            means,
            old.means,
            old.std_devs,
            DTS,
            advantages[:, None],
            clip_range=method.clip_range,
            ratio_norm=method.guard,
            reweight=method.guard,
        )
        log_ratio = log_ratios(old, means, old.samples)[int(method.guard)]
        return losses.mean(), log_ratio

    def epoch(carry, _, old: Trajectories, advantages):
        params, state = carry
        grads, log_ratio = jax.grad(loss_fn, has_aux=True)(params, old, advantages)
        updates, state = tx.update(grads, state)
        positive = (advantages > 0)[:, None]
        clipped = positive & (log_ratio > jnp.log1p(method.clip_range))
        statistics = {
            "mean": jnp.expm1(log_ratio).mean(0),
            "square": (jnp.expm1(log_ratio) ** 2).mean(0),
            "clipped": clipped.sum(0) / positive.sum(),
        }
        return (optax.apply_updates(params, updates), state), statistics

    def evaluate(params, key):
        samples = final_samples(params, key, held_out)
        return {name: metric(samples).mean() for name, metric in METRICS.items()}

    def iteration(carry, key):
        train_key, evaluation_key = jax.random.split(key)
        metrics = evaluate(carry[0], evaluation_key)
        old = rollout(carry[0], train_key, count)
        advantages = ox.losses.group_relative_advantages(
            proxy_reward(old.samples[:, -1]), ddof=0
        )
        carry, statistics = jax.lax.scan(
            functools.partial(epoch, old=old, advantages=advantages),
            carry,
            length=epochs,
        )
        return carry, (metrics, statistics)

    keys = jax.random.split(key, iterations + 1)
    carry = (params, tx.init(params))
    (params, _), (metrics, statistics) = jax.lax.scan(iteration, carry, keys[:-1])
    last = evaluate(params, keys[-1])
    metrics = {name: jnp.append(metrics[name], last[name]) for name in METRICS}
    return params, metrics, statistics
