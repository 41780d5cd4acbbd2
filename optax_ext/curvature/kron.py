r"""Kron: PSGD with one triangular factor for each axis of a tensor.

The preconditioner of a matrix G is :math:`Q_1^T Q_1 G Q_2^T Q_2`, which whitens G as
Shampoo does, but from triangular factors that are fitted by small multiplicative steps:
no roots, no eigenvalues, no damping. Fits cost a few products and a triangular solve an
axis, and become rare as the factors settle: `kron_update_schedule`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import (
    check_choice,
    check_hyperparam,
    check_interval,
    check_rate,
)
from optax_ext._core.geometry import length
from optax_ext._core.keys import key_state
from optax_ext._core.leaves import at_step, init_leaves, map_leaves, next_count
from optax_ext._core.optimizers import finish
from optax_ext._core.trees import treated
from optax_ext.curvature import _kron_factors as kronecker

_TITLE = "Stochastic Hessian Fittings with Lie Groups"
_NOISE = 2.0**-11.5
"""Root of the rounding of float32: the size of the probe against that of its input."""


@catalogued(
    title=_TITLE,
    arxiv="2402.11858",
    kind="schedule",
    variant="kron_torch, which evaluates it at the 0-based step; psgd_jax one later.",
    compared="closed form",
)
def kron_update_schedule(
    max_prob: float = 1.0,
    min_prob: float = 0.03,
    decay: float = 0.001,
    flat_start: int = 500,
) -> optax.Schedule:
    r"""How often Kron fits its factors: always at first, then ever more rarely.

    .. math:: p_t = \text{clip}\left( \text{max\_prob}\,
      e^{-\text{decay} (t - \text{flat\_start})}, \text{min\_prob}, \text{max\_prob}
      \right)

    Args:
      max_prob: share of steps at the start, in (0, 1].
      min_prob: share of steps at the end, in (0, 1]: 0.03 is every 34th.
      decay: rate of the fall, 1 / steps, at least 0.
      flat_start: steps before the fall.

    Returns:
      A schedule of the 0-based step.

    Raises:
      ValueError: for numbers outside their range.

    Example:
      >>> import optax_ext as ox
      >>> share = ox.kron_update_schedule()
      >>> print(f"{share(0):.2f} {share(1000):.2f} {share(10_000):.2f}")
      1.00 0.61 0.03
    """
    owner = "kron_update_schedule"
    check_hyperparam(
        owner, low=0.0, high=1.0, open_low=True, max_prob=max_prob, min_prob=min_prob
    )
    check_hyperparam(owner, low=0.0, decay=decay, flat_start=flat_start)

    def schedule(count):
        t = jnp.asarray(count, float)
        falling = max_prob * jnp.exp(-decay * (t - flat_start))
        return jnp.clip(falling, min_prob, max_prob)

    return schedule


def _where(condition: jax.Array, a: Any, b: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


class KronState(NamedTuple):
    """State of `scale_by_kron`; `factors` has a tuple of arrays at each leaf.

    `waited` counts the steps since the last fit, `fits` the fits.
    """

    count: jax.Array
    waited: jax.Array
    fits: jax.Array
    mu: optax.Updates
    factors: Any
    key: jax.Array


@catalogued(
    title=_TITLE,
    arxiv="2402.11858",
    kind="link",
    state="1 + factors: (a^2 + b^2) / (a b) for [a, b] with two triangular ones",
    slots=4.125,
    variant="kron_torch without its noise in the momentum, as in psgd_jax; a leaf of "
    "input 0 keeps its factors, which would grow without end.",
    compared="golden kron",
)
def scale_by_kron(
    b1: float = 0.9,
    precond_lr: float = 0.1,
    precond_init_scale: float = 1.0,
    update_probability: optax.ScalarOrSchedule | None = None,
    max_size_triangular: int = 8192,
    min_ndim_triangular: int = 2,
    memory_save_mode: str | None = None,
    momentum_into_precond_update: bool = True,
    merge_dims: bool = True,
    balance_interval: int = 100,
    update_rms: float = 1.1,
    mu_dtype: Any = None,
    precond_dtype: Any = None,
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Whiten momentum by a triangular factor for each axis.

    .. math::
      X = \hat m_t + 2^{-11.5} \text{mean}|\hat m_t|\, V, \quad
      A = (Q_1 \otimes Q_2 \cdots) X, \quad
      B = (Q_1^{-T} \otimes Q_2^{-T} \cdots) V

    .. math::
      Q_i \leftarrow Q_i - \mu\, \text{triu}(A_{(i)} A_{(i)}^T - B_{(i)} B_{(i)}^T) Q_i,
      \quad \mu = \frac{\text{precond\_lr}}{\| A_{(i)} A_{(i)}^T + B_{(i)} B_{(i)}^T \|}

    with normal V, a lower bound for the norm, and :math:`A_{(i)}` the unfolding along
    axis i; diagonal factors see the diagonals of the same. The output is
    :math:`u = (Q_1^T Q_1 \otimes Q_2^T Q_2 \cdots) \hat m_t`, with a root mean square
    of at most `update_rms` in each leaf. The extra argument ``vector`` replaces V.

    Args:
      b1: decay rate of the momentum, in [0, 1).
      precond_lr: step size of the fit, at least 0.
      precond_init_scale: Q at the start, above 0.
      update_probability: share of steps that fit the factors, a number in (0, 1] or a
        schedule: a step fits when 1 / share steps have passed. None is
        ``kron_update_schedule()``.
      max_size_triangular: longest axis that has a triangular factor.
      min_ndim_triangular: smallest rank of a leaf that has triangular factors.
      memory_save_mode: None; "one_diag" makes the factor of the longest axis diagonal,
        the last one on ties; "smart_one_diag" only where there is one longest axis;
        "all_diag" all of them.
      momentum_into_precond_update: whether factors are fitted to the momentum or to the
        gradient.
      merge_dims: whether a leaf of rank above 2 is the matrix
        [prod(shape[:-1]), shape[-1]], or has a factor for each axis.
      balance_interval: fits between the factors of a leaf being made equally large.
      update_rms: largest root mean square of a leaf's update, above 0.
      mu_dtype: dtype of the momentum; None keeps float32.
      precond_dtype: dtype of the stored factors; None keeps float32. Fits compute in
        float32 at least.
      key: where V starts; None is ``jax.random.key(0)``.

    Defaults are those of kron_torch.

    Returns:
      A link that emits the un-negated direction.

    Raises:
      ValueError: for an unknown mode or numbers outside their range.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> state = ox.scale_by_kron().init({"w": jnp.ones((2, 3)), "b": jnp.ones(3)})
      >>> {name: [q.shape for q in factors] for name, factors in state.factors.items()}
      {'b': [(3,)], 'w': [(2, 2), (3, 3)]}
    """
    owner = "scale_by_kron"
    check_rate(owner, b1=b1)
    check_hyperparam(owner, low=0.0, precond_lr=precond_lr)
    check_hyperparam(owner, low=0.0, open_low=True, update_rms=update_rms)
    check_hyperparam(
        owner, low=0.0, open_low=True, precond_init_scale=precond_init_scale
    )
    share = kron_update_schedule() if update_probability is None else update_probability
    check_hyperparam(owner, low=0.0, high=1.0, open_low=True, update_probability=share)
    check_interval(owner, balance_interval=balance_interval)
    check_interval(owner, max_size_triangular=max_size_triangular)
    if memory_save_mode is not None:
        modes = ("one_diag", "smart_one_diag", "all_diag")
        check_choice(owner, "memory_save_mode", memory_save_mode, modes)
    data, impl = key_state(key)

    def tensor(x):
        return x.reshape(kronecker.view_shape(x.shape, merge_dims))

    def init_leaf(p):
        x = tensor(p)
        is_diagonal = kronecker.diagonal_axes(
            x.shape, max_size_triangular, min_ndim_triangular, memory_save_mode
        )
        factors = kronecker.identity(x, is_diagonal, precond_init_scale)
        factors = jax.tree.map(lambda q: q.astype(precond_dtype or q.dtype), factors)
        return jnp.zeros_like(p, mu_dtype), factors

    def init(params):
        count, waited, fits = (jnp.zeros([], jnp.int32) for _ in range(3))
        mu, factors = init_leaves(init_leaf, params, 2)
        return KronState(count, waited, fits, mu, factors, jnp.array(data))

    def momentum(g, slots):
        return g, (b1 * slots[0] + (1 - b1) * g,)

    def corrected(m, count):
        return tensor(m) / (1 - b1 ** count.astype(m.dtype))

    def fitted(updates, state, vector):
        """Steps waited, number of fits, factors and key after one more fit."""
        use, keep = jax.random.split(jax.random.wrap_key_data(state.key, impl=impl))
        if vector is None:
            vector = optax.tree.random_like(use, state.mu, jax.random.normal)
        fits = next_count(state.fits)

        def rule(g, slots, m, v):
            (old,), v = slots, tensor(v)
            x = corrected(m, state.count) if momentum_into_precond_update else tensor(g)
            noisy = x + _NOISE * jnp.mean(jnp.abs(x)) * v
            start = _where(fits % balance_interval == 0, kronecker.balanced(old), old)
            new = kronecker.fit(start, noisy, v, precond_lr)
            return g, (_where(jnp.any(x != 0), new, old),)

        _, (factors,) = map_leaves(
            rule, updates, (state.factors,), (state.mu, vector), owner=owner
        )
        return jnp.zeros_like(state.waited), fits, factors, jax.random.key_data(keep)

    def update(updates, state, params=None, **extra):
        del params
        count, waited = next_count(state.count), next_count(state.waited)
        _, (mu,) = map_leaves(momentum, updates, (state.mu,))
        state = state._replace(count=count, mu=mu)
        t = count.astype(float)
        is_due = waited.astype(t.dtype) >= 1 / jnp.asarray(at_step(share, t), t.dtype)
        waited, fits, factors, next_key = jax.lax.cond(
            is_due,
            lambda: fitted(updates, state, extra.get("vector")),
            lambda: (waited, state.fits, state.factors, state.key),
        )

        def precondition(g, slots, m, factors):
            u = kronecker.apply(factors, corrected(m, count)).reshape(g.shape)
            rms = length(u) / jnp.sqrt(jnp.asarray(u.size, u.dtype))
            return u * jnp.minimum(1, update_rms / (rms + 1e-12)), slots

        out, _ = map_leaves(precondition, updates, (), (mu, factors))
        return out, KronState(count, waited, fits, mu, factors, next_key)

    return optax.GradientTransformationExtraArgs(init, update)


@catalogued(
    title=_TITLE,
    arxiv="2402.11858",
    kind="optimizer",
    needs=("params",),
    state="1 + factors: (a^2 + b^2) / (a b) for [a, b] with two triangular ones",
    slots=4.125,
    variant="kron_torch; decay multiplied by the learning rate, on matrices only.",
    compared="golden kron",
)
def kron(
    learning_rate: optax.ScalarOrSchedule = 3e-4,
    b1: float = 0.9,
    weight_decay: float = 0.0,
    mask: Any = None,
    precond_lr: float = 0.1,
    precond_init_scale: float = 1.0,
    update_probability: optax.ScalarOrSchedule | None = None,
    max_size_triangular: int = 8192,
    min_ndim_triangular: int = 2,
    memory_save_mode: str | None = None,
    momentum_into_precond_update: bool = True,
    merge_dims: bool = True,
    balance_interval: int = 100,
    update_rms: float = 1.1,
    mu_dtype: Any = None,
    precond_dtype: Any = None,
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Kron with decoupled decay.

    .. math:: x_t = x_{t-1} - \eta_t (u_t + \lambda x_{t-1})

    with u from `scale_by_kron`.

    Args:
      learning_rate: number or schedule (kron_torch: 3e-4; a third of Adam's).
      b1: decay rate of the momentum, in [0, 1).
      weight_decay: decoupled decay, multiplied by the learning rate.
      mask: which leaves decay, as in `optax.add_decayed_weights`; None is those of rank
        2 and more.
      precond_lr: as in `scale_by_kron`.
      precond_init_scale: as in `scale_by_kron`.
      update_probability: as in `scale_by_kron`.
      max_size_triangular: as in `scale_by_kron`.
      min_ndim_triangular: as in `scale_by_kron`.
      memory_save_mode: as in `scale_by_kron`.
      momentum_into_precond_update: as in `scale_by_kron`.
      merge_dims: as in `scale_by_kron`.
      balance_interval: as in `scale_by_kron`.
      update_rms: as in `scale_by_kron`.
      mu_dtype: dtype of the momentum; None keeps float32.
      precond_dtype: dtype of the stored factors; None keeps float32.
      key: as in `scale_by_kron`.

    Returns:
      A finished optimizer.

    Raises:
      ValueError: for an unknown mode or numbers outside their range.

    Example:
      >>> import optax_ext as ox
      >>> tx = ox.kron(1e-3, weight_decay=0.1, memory_save_mode="smart_one_diag")
    """
    return finish(
        scale_by_kron(
            b1,
            precond_lr,
            precond_init_scale,
            update_probability,
            max_size_triangular,
            min_ndim_triangular,
            memory_save_mode,
            momentum_into_precond_update,
            merge_dims,
            balance_interval,
            update_rms,
            mu_dtype,
            precond_dtype,
            key,
        ),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        mask=functools.partial(treated, None) if mask is None else mask,
        owner="kron",
    )
