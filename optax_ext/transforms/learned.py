r"""A small learned optimizer: a network on what Adam and Adafactor know.

For each entry of a leaf the network sees 39 numbers: the gradient, the parameter,
averages of both moments at several rates, Adafactor's factored second moments, the
ratios of all these, and the time. It is the same network for every entry of every leaf,
trained elsewhere on many short tasks; `scale_by_mlp_lopt` applies it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam, check_interval
from optax_ext._core.leaves import leafwise

_TITLE = "μLO: Compute-Efficient Meta-Generalization of Learned Optimizers"
_DECAYS = {
    "momentum_decays": (0.9, 0.99, 0.999),
    "rms_decays": (0.999,),
    "adafactor_decays": (0.9, 0.99, 0.999),
}
_TIMES = np.array([1, 3, 10, 30, 100, 300, 1e3, 3e3, 1e4, 3e4, 1e5])
_FEATURES = 28


class MlpLoptState(NamedTuple):
    """State of `scale_by_mlp_lopt`; for rank 0 and 1 `columns` is one 0."""

    count: jax.Array
    mu: optax.Updates
    nu: optax.Updates
    rows: optax.Updates
    columns: optax.Updates


def _zero_theta(hidden_size: int) -> dict[str, jax.Array]:
    sizes = (_FEATURES + len(_TIMES), hidden_size, hidden_size, 2)
    theta = {name: jnp.zeros(len(d)) for name, d in _DECAYS.items()}
    for i in range(3):
        theta[f"w{i}"] = jnp.zeros((sizes[i], sizes[i + 1]))
        theta[f"b{i}"] = jnp.zeros(sizes[i + 1])
    return theta


def _descent_theta() -> dict[str, jax.Array]:
    """A network that emits the gradient over its root mean square."""
    sign, theta = jnp.array([1.0, -1.0]), _zero_theta(2)
    return theta | {
        "w0": theta["w0"].at[0].set(sign),
        "w1": jnp.eye(2),
        "w2": theta["w2"].at[:, 0].set(sign),
    }


@catalogued(
    title=_TITLE,
    arxiv="2406.00153",
    kind="helper",
    variant="weights normal, cut at 2 deviations of fan_in^-1/2; the rest 0.",
    compared="shapes of golden mlp_lopt",
    example=lambda: {"key": jax.random.key(0), "hidden_size": 4},
)
def init_mlp_lopt(key: jax.Array, hidden_size: int = 32) -> dict[str, jax.Array]:
    r"""Untrained meta-parameters for `scale_by_mlp_lopt`, where meta-training starts.

    .. math:: w \sim N(0, 1 / \text{fan\_in}) \text{ within two deviations}, \qquad
      b = 0

    Args:
      key: for the weights.
      hidden_size: H, width of both hidden layers (paper's experiments; the class
        default of google/learned_optimization is 4).

    Returns:
      Dict of w0 [39, H], b0, w1 [H, H], b1, w2 [H, 2], b2, and offsets of the decay
      rates momentum_decays [3], rms_decays [1], adafactor_decays [3].

    Raises:
      ValueError: for a `hidden_size` below 1.

    Example:
      >>> import jax, optax_ext as ox
      >>> theta = ox.init_mlp_lopt(jax.random.key(0), hidden_size=4)
      >>> theta["w0"].shape
      (39, 4)
    """
    check_interval("init_mlp_lopt", hidden_size=hidden_size)
    theta = _zero_theta(hidden_size)
    for name, k in zip(("w0", "w1", "w2"), jax.random.split(key, 3), strict=True):
        shape = theta[name].shape
        theta[name] = jax.random.truncated_normal(k, -2, 2, shape) / shape[0] ** 0.5
    return theta


@catalogued(
    title=_TITLE,
    arxiv="2406.00153",
    kind="link",
    needs=("params",),
    state="4 + 3 (rows + columns); rank 0 and 1: 7",
    slots=4.105,  # for the shapes on which the conformance test measures it
    variant="adafac_mlp_lopt of google/learned_optimization; no weights are shipped. "
    "Gradients are cut where their square would overflow.",
    compared="golden mlp_lopt",
    example=lambda: {"theta": _descent_theta(), "step_mult": 1.0},
)
def scale_by_mlp_lopt(
    theta: Mapping[str, Any], exp_mult: float = 1e-3, step_mult: float = 1e-3
) -> optax.GradientTransformationExtraArgs:
    r"""Apply a meta-trained network as update rule.

    .. math:: u = d\, e^{\text{exp\_mult} \cdot a}\, \text{step\_mult}, \qquad
      (d, a) = \text{MLP}_\theta(\text{features})

    Averages start at 0 and are not bias-corrected. Each of 28 features is divided by
    its root mean square over the leaf; 11 more tell the time. For muLO chain
    `scale_by_mup` with base width 1 behind it, then ``optax.scale(-1.0)``.

    Args:
      theta: meta-parameters, as `init_mlp_lopt` makes them.
      exp_mult: how strongly the second output scales the step.
      step_mult: size of the step: 1e-3 for the standard parametrization, 0.01 for muLO.

    Returns:
      A link that emits the un-negated direction; needs params.

    Raises:
      ValueError: for meta-parameters that are missing or do not fit; at trace time
        without params.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_ext as ox
      >>> theta = ox.init_mlp_lopt(jax.random.key(0), hidden_size=4)
      >>> tx = optax.chain(ox.scale_by_mlp_lopt(theta), optax.scale(-1.0))
      >>> w = jnp.ones((3, 2))
      >>> updates, state = tx.update(w, tx.init(w), w)
      >>> updates.shape
      (3, 2)
    """
    _check_theta(theta)
    check_hyperparam("scale_by_mlp_lopt", exp_mult=exp_mult, step_mult=step_mult)

    def init(p):
        mu, axes = jnp.stack([jnp.zeros_like(p)] * 3), _factored_axes(p.shape)
        if axes is None:
            # Orbax cannot save an array of size 0, so a number stands for no columns.
            return mu, jnp.zeros_like(p), jnp.zeros_like(mu), jnp.zeros([], p.dtype)
        column, row = axes
        rows, columns = (jnp.sum(mu, axis, keepdims=True) for axis in (row, column))
        return mu, jnp.zeros_like(p), rows, columns

    def update(g, slots, p, t):
        mine = {name: jnp.asarray(x, g.dtype) for name, x in theta.items()}
        g = jnp.where(jnp.isnan(g), 0, g)
        limit = float(jnp.finfo(g.dtype).max) ** 0.4
        g = jnp.clip(g, -limit, limit)
        slots = _averages(mine, g, *slots)
        times = jnp.tanh((t - 1) / jnp.asarray(_TIMES, t.dtype) - 1)
        out = _network(mine, _features(g, p, *slots), times)
        step = out[..., 0] * jnp.exp(exp_mult * out[..., 1]) * step_mult
        return step, slots

    return leafwise(MlpLoptState, init, update, needs_params=True)


def _check_theta(theta: Mapping[str, Any]) -> None:
    hidden = jnp.shape(theta["b0"])[0] if "b0" in theta else 1
    for name, wanted in jax.eval_shape(lambda: _zero_theta(hidden)).items():
        got = jnp.shape(theta[name]) if name in theta else "nothing"
        if got != wanted.shape:
            raise ValueError(
                f"scale_by_mlp_lopt: theta[{name!r}] must have shape {wanted.shape}, "
                f"got {got}; init_mlp_lopt makes all of them"
            )


def _factored_axes(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Second longest and longest axis, counted behind the axis of the three rates."""
    if len(shape) < 2:
        return None
    second, longest = np.argsort(shape, kind="stable")[-2:] + 1
    return int(second), int(longest)


def _averages(theta: Any, g: jax.Array, mu: Any, nu: Any, rows: Any, columns: Any):
    """The averages after one more gradient; rates come first: [3, *shape]."""

    def averaged(old, new, name, clip=True):
        base = np.log1p(-np.array(_DECAYS[name])) / 10
        rate = jnp.exp(10 * (jnp.asarray(base, g.dtype) + theta[name]))
        rate = jnp.clip(rate, 0, 1) if clip else rate
        rate = rate.reshape(-1, *[1] * (old.ndim - 1))
        return old + rate * (new - old)

    mu = averaged(mu, g[None], "momentum_decays", clip=False)
    nu = averaged(nu[None], g[None] ** 2, "rms_decays")[0]
    square, axes = g[None] ** 2 + 1e-30, _factored_axes(g.shape)
    if axes is None:
        return mu, nu, averaged(rows, square, "adafactor_decays"), columns
    column, row = axes
    by_row = jnp.mean(square, row, keepdims=True)
    by_column = jnp.mean(square, column, keepdims=True)
    rows = averaged(rows, by_row, "adafactor_decays")
    return mu, nu, rows, averaged(columns, by_column, "adafactor_decays")


def _features(
    g: jax.Array, p: jax.Array, mu: Any, nu: Any, rows: Any, columns: Any
) -> jax.Array:
    """What the network sees of every entry, each over its root mean square."""

    def root(x):
        return jnp.maximum(x, 1e-9) ** -0.5

    axes, g, p, nu = _factored_axes(g.shape), g[None], p[None], nu[None]
    if axes is None:
        columns = rows
        of_gradient, of_momentum = root(rows + 1e-9), (rows + 1e-6) ** -0.5
    else:
        share = rows / (jnp.mean(rows, axes[0], keepdims=True) + 1e-9)
        of_gradient = of_momentum = root(share) * root(columns)
    rms = (nu + 1e-6) ** -0.5
    blocks = [g, p, mu, nu, mu * rms, rms, g * of_gradient, rows, columns]
    blocks += [(rows + 1e-8) ** -0.5, (columns + 1e-8) ** -0.5, mu * of_momentum]
    x = jnp.concatenate([jnp.broadcast_to(b, (len(b), *g.shape[1:])) for b in blocks])
    # Divided by the largest entry first, so that its square does not overflow.
    entries = tuple(range(1, x.ndim))
    scale = jnp.maximum(jnp.max(jnp.abs(x), entries, keepdims=True), 1)
    x = x / scale
    floor = 1e-5 / scale / scale
    return x / jnp.sqrt(floor + jnp.mean(x**2, entries, keepdims=True))


def _network(theta: Any, features: jax.Array, times: jax.Array) -> jax.Array:
    """Direction and logarithm of the size: [*shape, 2]."""

    def plus(x, b):
        return x + jnp.broadcast_to(b, x.shape)

    seen, clock = jnp.split(theta["w0"], [_FEATURES])
    x = jnp.tensordot(features, seen, (0, 0))  # the time is the same for all entries
    x = jax.nn.relu(plus(x, times @ clock + theta["b0"]))
    x = jax.nn.relu(plus(x @ theta["w1"], theta["b1"]))
    return plus(x @ theta["w2"], theta["b2"])
