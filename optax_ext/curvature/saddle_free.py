r"""Newton's method with the absolute value of the Hessian.

Newton's step is drawn to every stationary point. Dividing by the absolute values of the
eigenvalues keeps its scale and turns its direction downhill along negative curvature.
For more than a few hundred parameters the Hessian is seen on the Krylov space of the
gradient only, which a few Hessian-vector products span.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam, check_interval, check_params
from optax_ext._core.extra_args import require
from optax_ext._core.flat import FlatView
from optax_ext._core.geometry import length
from optax_ext._core.lanczos import lanczos
from optax_ext._core.optimizers import finish
from optax_ext.curvature.products import hvp

_TITLE = "On the saddle point problem for non-convex optimization"


@catalogued(
    title=_TITLE,
    arxiv="1405.4604",
    kind="link",
    needs=("params", "value_fn"),
    slots=0,
    variant="exact, or on the Krylov space of the gradient (Lanczos, orthogonalised "
    "twice).",
    compared="goldens saddle_free_newton, saddle_free_newton_krylov",
    # Rounding in flat directions is divided by the damping: more than the default
    # lets two programs be compared.
    example=lambda: {"damping": 1.0},
)
def scale_by_saddle_free_newton(
    rank: int | None = None,
    damping: float = 1e-3,
    damping_candidates: Sequence[float] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Divide the gradient by the absolute value of the Hessian.

    .. math:: u = Q\, (|\Lambda| + \lambda)^{-1} Q^\top g, \qquad
      H = Q \Lambda Q^\top

    With a `rank` k, :math:`Q = V U` from k steps of Lanczos that start at g, where
    :math:`V^\top H V = U \Lambda U^\top`; g lies in that space, so that nothing of it
    is lost. u is always a descent direction.

    Args:
      rank: k, about 20 (the paper: 500); costs k Hessian-vector products and k copies
        of the parameters. None forms the Hessian: n gradients, n^2 numbers.
      damping: :math:`\lambda`, 0 or more. Directions without curvature and damping are
        left out.
      damping_candidates: several :math:`\lambda` to try in place of `damping`; kept is
        the one with the lowest ``value_fn(params - u)``, one evaluation each.

    Returns:
      A link that emits the un-negated direction and needs params and ``value_fn``.

    Raises:
      ValueError: for a rank below 1, a negative damping or no candidates; at trace time
        without params or ``value_fn``.

    Example:
      >>> import jax, jax.numpy as jnp, optax_ext as ox
      >>> f = lambda x: (5 * x[0] ** 2 - x[1] ** 2) / 2
      >>> x, tx = jnp.array([1.0, 0.1]), ox.scale_by_saddle_free_newton(damping=0.0)
      >>> u, _ = tx.update(jax.grad(f)(x), tx.init(x), x, value_fn=f)
      >>> print(x - u)  # Newton's method would end at the saddle, 0
      [0.  0.2]
    """
    owner = "scale_by_saddle_free_newton"
    if rank is not None:
        check_interval(owner, rank=rank)
    check_hyperparam(owner, low=0.0, damping=damping)
    if damping_candidates is not None and not len(damping_candidates):
        raise ValueError(f"{owner}: damping_candidates must hold a number, or be None")
    for candidate in damping_candidates or ():
        check_hyperparam(owner, low=0.0, damping_candidates=candidate)

    def update(updates, state, params=None, **extra):
        check_params(owner, params)
        value_fn = require(owner, extra, "value_fn")
        view = FlatView(updates, owner)
        if view.size == 0:
            return updates, state
        g, p = view.to(updates), view.to(params)
        f = view.function(value_fn, params)
        values, along, lift = _spectrum(f, p, g, rank)

        def direction(damping):
            curvature = jnp.abs(values) + damping
            usable = curvature > 0
            return lift(jnp.where(usable, along / jnp.where(usable, curvature, 1), 0))

        if damping_candidates is None:
            return view.back(direction(damping)), state

        def value_of(damping):
            value = f(p - direction(damping))
            return jnp.where(jnp.isnan(value), jnp.inf, value)

        candidates = jnp.asarray(damping_candidates, g.dtype)
        best = jnp.argmin(jax.lax.map(value_of, candidates))
        return view.back(direction(candidates[best])), state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update
    )


def _spectrum(
    f: Callable[[jax.Array], jax.Array], p: jax.Array, g: jax.Array, rank: int | None
) -> tuple[jax.Array, jax.Array, Callable[[jax.Array], jax.Array]]:
    """Eigenvalues, the gradient along their vectors, and the way back to [n]."""
    if rank is None:
        values, q = jnp.linalg.eigh(jax.hessian(f)(p))
        return values, g @ q, lambda x: q @ x
    product = hvp(f)
    v, matrix = lanczos(lambda x: product(p, x), g, min(rank, g.size))
    values, u = jnp.linalg.eigh(matrix)
    return values, length(g) * u[0], lambda x: (u @ x) @ v


@catalogued(
    title=_TITLE,
    arxiv="1405.4604",
    kind="optimizer",
    needs=("params", "value_fn"),
    slots=0,
    variant="exact, or on the Krylov space of the gradient.",
    compared="goldens saddle_free_newton, saddle_free_newton_krylov",
    # Rounding in flat directions is divided by the damping: more than the default
    # lets two programs be compared.
    example=lambda: {"damping": 1.0},
)
def saddle_free_newton(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    damping: float = 1e-3,
    rank: int | None = None,
    damping_candidates: Sequence[float] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Saddle-free Newton: Newton's method that only minima attract.

    .. math:: x_t = x_{t-1} - \eta_t\, |H_t|^{-1} g_t

    with :math:`|H|^{-1} g` from `scale_by_saddle_free_newton`.

    Args:
      learning_rate: number or schedule; 1 is the full step.
      damping: added to the absolute eigenvalues.
      rank: size of the Krylov space; None forms the Hessian.
      damping_candidates: several dampings to try with a full step.

    Returns:
      A finished optimizer that needs params and ``value_fn``.

    Raises:
      ValueError: for hyper-parameters outside their range.

    Example:
      >>> import optax_ext as ox
      >>> tx = ox.saddle_free_newton(0.5, rank=20)
    """
    return finish(
        scale_by_saddle_free_newton(rank, damping, damping_candidates),
        learning_rate=learning_rate,
        owner="saddle_free_newton",
    )
