"""Sign momentum: Lion and its family.

Lion steps along the sign of a momentum. The sign is the gradient of one convex function
K of the momentum, and there are others. With decoupled weight decay each K solves a
constrained or penalised problem: minimise f(x) + K*(wd x) / wd, with K* the conjugate
of K. K = |.|_1 gives the sign and the box |x| <= 1/wd (Lion itself); other kernels give
other balls, sparse steps, or a smooth sign.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_choice, check_hyperparam, check_rate
from optax_ext._core.leaves import leafwise
from optax_ext._core.optimizers import finish

Kernel = Callable[[jax.Array], jax.Array]


def _unit(u: jax.Array, axis: Any = None) -> jax.Array:
    """U over its largest entry, so that no norm of it overflows; 0 stays 0."""
    largest = jnp.max(jnp.abs(u), axis=axis, keepdims=True)
    return u / jnp.where(largest > 0, largest, 1)


def _l1() -> Kernel:
    return jnp.sign


def _lp(p: float) -> Kernel:
    check_hyperparam("lion_kernel('lp')", low=1.0, open_low=True, p=p)

    def kernel(u):
        size = jnp.abs(_unit(u))
        total = jnp.sum(size**p)
        norm = jnp.where(total > 0, total, 1) ** (1 / p)
        return jnp.sign(u) * (size / norm) ** (p - 1)

    return kernel


def _group(axis: Any = -1) -> Kernel:
    def kernel(u):
        if u.ndim == 0:
            return jnp.sign(u)
        unit = _unit(u, axis)
        square = jnp.sum(unit**2, axis=axis, keepdims=True)
        return unit / jnp.sqrt(jnp.where(square > 0, square, 1))

    return kernel


def _truncated(e: float) -> Kernel:
    check_hyperparam("lion_kernel('truncated')", low=0.0, e=e)
    return lambda u: jnp.where(jnp.abs(u) > e, jnp.sign(u), 0)


def _topk(k: int) -> Kernel:
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"lion_kernel('topk'): k must be an integer >= 1, got {k!r}")

    def kernel(u):
        size = jnp.abs(u).ravel()
        threshold = jax.lax.top_k(size, min(k, size.size))[0][-1]
        return jnp.where(jnp.abs(u) >= threshold, jnp.sign(u), 0)

    return kernel


def _huber(e: float) -> Kernel:
    check_hyperparam("lion_kernel('huber')", low=0.0, open_low=True, e=e)
    return lambda u: jnp.clip(u / e, -1, 1)


def _pseudo_huber(e: float) -> Kernel:
    check_hyperparam("lion_kernel('pseudo_huber')", low=0.0, open_low=True, e=e)
    return lambda u: u / jnp.hypot(u, jnp.full_like(u, e))


_KERNELS: dict[str, Callable[..., Kernel]] = {
    "l1": _l1,
    "lp": _lp,
    "group": _group,
    "truncated": _truncated,
    "topk": _topk,
    "huber": _huber,
    "pseudo_huber": _pseudo_huber,
}


@catalogued(
    title="Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts",
    arxiv="2310.05898",
    kind="helper",
    variant="K even, so the sign convention of the paper's momentum does not matter.",
    compared="goldens lion_k_*; torch autograd of K (in the specification)",
    example=lambda: {"name": "huber", "e": 0.1},
)
def lion_kernel(name: str, **params: Any) -> Kernel:
    r"""The gradient of K, by name: what `lion_k` applies to its momentum.

    ============== ============== ================================== ===================
    name           parameters     gradient of K at u                 with decay wd
    ============== ============== ================================== ===================
    "l1"                          sign(u)                            abs(x) <= 1/wd
    "lp"           p > 1          sign(u) (abs(u) / norm_p(u))^(p-1) dual-norm ball
    "group"        axis=-1        u / norm_2(u) along axis           group norms <= 1/wd
    "truncated"    e >= 0         sign(u) where abs(u) > e, else 0   box, plus l1 term
    "topk"         k >= 1         sign(u) on the k largest abs(u)    box and l1 ball
    "huber"        e > 0          clip(u / e, -1, 1)                 box, plus square
    "pseudo_huber" e > 0          u / sqrt(u^2 + e^2)                box, plus barrier
    ============== ============== ================================== ===================

    Args:
      name: a row of the table.
      **params: its parameters, by keyword. `axis` is an int or a tuple of the axes that
        make a group. Ties at the k-th place of "topk" all count.

    Returns:
      A function of one leaf. An all-zero leaf or group gives 0.

    Raises:
      ValueError: for an unknown name or a parameter outside its range.
      TypeError: for a parameter that the kernel does not have.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> print(ox.lion_kernel("huber", e=0.5)(jnp.array([-2.0, 0.25])))
      [-1.   0.5]
    """
    check_choice("lion_kernel", "name", name, _KERNELS)
    return _KERNELS[name](**params)


class LionKState(NamedTuple):
    """State of `scale_by_lion_k`."""

    mu: optax.Updates


@catalogued(
    title="Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts",
    arxiv="2310.05898",
    kind="link",
    state="1 (momentum)",
    slots=1,
    variant="Lion's double average: b1 for the step, b2 for the stored momentum.",
    compared="goldens lion_k_*; bit-equal to optax.scale_by_lion for 'l1'",
)
def scale_by_lion_k(
    b1: float = 0.9,
    b2: float = 0.99,
    kappa: str | Kernel = "l1",
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Lion with any convex kernel K.

    .. math::
      d_t = \nabla K(b_1 m_{t-1} + (1 - b_1) g_t), \qquad
      m_t = b_2 m_{t-1} + (1 - b_2) g_t

    With K = "l1" it is `optax.scale_by_lion`, in float32 for any leaf dtype.

    Args:
      b1: weight of the old momentum in the step, in [0, 1); Lion's default.
      b2: decay rate of the stored momentum, in [0, 1); Lion's default.
      kappa: name of a kernel without parameters, or a function of one leaf, such as
        ``lion_kernel("lp", p=1.5)``.
      mu_dtype: dtype of the stored momentum; None keeps float32 (float64 for float64
        leaves).

    Returns:
      A link that emits the un-negated direction.

    Raises:
      ValueError: for rates outside [0, 1), or an unknown kernel.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> tx = ox.scale_by_lion_k(kappa="group")
      >>> params = jnp.zeros((1, 2))
      >>> updates, _ = tx.update(jnp.array([[3.0, 4.0]]), tx.init(params))
      >>> print(updates)
      [[0.6 0.8]]
    """
    check_rate("scale_by_lion_k", b1=b1, b2=b2)
    kernel = kappa if callable(kappa) else lion_kernel(kappa)

    def init(p):
        return (jnp.zeros_like(p, dtype=mu_dtype),)

    def update(g, slots, p, t):
        del p, t
        (m,) = slots
        direction = kernel((1 - b1) * g + b1 * m)
        return direction, ((1 - b2) * g + b2 * m,)

    return leafwise(LionKState, init, update)


@catalogued(
    title="Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts",
    arxiv="2310.05898",
    kind="optimizer",
    needs=("params",),
    state="1 (momentum)",
    slots=1,
    variant="decay multiplied by the learning rate, as in Lion.",
    compared="goldens lion_k_*; bit-equal to optax.lion for 'l1'",
    example=lambda: {"learning_rate": 0.01},
)
def lion_k(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.99,
    kappa: str | Kernel = "l1",
    mu_dtype: Any = None,
    weight_decay: float = 1e-3,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Lion with any convex kernel K, decay and learning rate.

    .. math::
      x_t = x_{t-1} - \eta_t (\nabla K(b_1 m_{t-1} + (1 - b_1) g_t) + \lambda x_{t-1})

    It minimises f(x) + K*(wd x) / wd: decay wd sets the size of the ball or box that
    the kernel stands for (see `lion_kernel`).

    Args:
      learning_rate: number or schedule; learning_rate * weight_decay must stay below 1.
      b1: weight of the old momentum in the step, in [0, 1).
      b2: decay rate of the stored momentum, in [0, 1).
      kappa: kernel, as in `scale_by_lion_k`.
      mu_dtype: dtype of the stored momentum; None keeps float32.
      weight_decay: decoupled decay, multiplied by the learning rate (optax.lion's
        default).
      mask: which leaves decay, as in `optax.add_decayed_weights`.

    Returns:
      A finished optimizer.

    Raises:
      ValueError: for hyper-parameters outside their range.

    Example:
      >>> import optax_ext as ox
      >>> tx = ox.lion_k(1e-3, kappa=ox.lion_kernel("pseudo_huber", e=1e-3))
    """
    if isinstance(learning_rate, float) and isinstance(weight_decay, float):
        shrink = learning_rate * weight_decay
        check_rate("lion_k", **{"learning_rate * weight_decay": shrink})
    return finish(
        scale_by_lion_k(b1, b2, kappa, mu_dtype),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        mask=mask,
        owner="lion_k",
    )
