r"""Steps to the boundary of a norm ball, along momentum.

A trust region asks for the direction of length 1 that decreases a linear model most. In
which norm the length is measured decides which method that is:

========== ===================================== ================================
norm       direction for m                       with momentum it is
========== ===================================== ================================
"linf"     sign(m)                               signSGD with momentum
"l2"       m / norm(m)                           normalised SGD with momentum
"l1"       the sign of the largest entry         greedy coordinate descent
"spectral" U V^T, where m = U S V^T              Muon (orthogonalised momentum)
"nuclear"  u_1 v_1^T                             conditional gradient of rank one
========== ===================================== ================================
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_choice, check_interval, check_rate
from optax_ext._core.flat import FlatView
from optax_ext._core.geometry import length
from optax_ext._core.leaves import init_leaves, map_leaves, next_count
from optax_ext._core.matrices import as_matrix
from optax_ext._core.newton_schulz import newton_schulz
from optax_ext._core.optimizers import finish
from optax_ext._core.trees import computing_dtype, flatten_like, is_hole, is_unit

_TITLE = (
    "Understanding Gradient Orthogonalization for Deep Learning via Non-Euclidean "
    "Trust-Region Optimization"
)
Norm = str | Callable[[str], str] | dict[str, Any]


def _l2(x: jax.Array) -> jax.Array:
    norm = length(x)
    return x / jnp.where(norm > 0, norm, 1)


def _l1(x: jax.Array) -> jax.Array:
    flat = x.ravel()
    largest = jnp.argmax(jnp.abs(flat))
    return (
        jnp.zeros_like(flat).at[largest].set(jnp.sign(flat[largest])).reshape(x.shape)
    )


def _unit_matrix(x: jax.Array) -> jax.Array:
    """Largest entry 1: a matrix that no decomposition can overflow on; 0 stays 0."""
    largest = jnp.max(jnp.abs(x))
    return as_matrix(x / jnp.where(largest > 0, largest, 1))


def _spectral(x: jax.Array) -> jax.Array:
    m = _unit_matrix(x)
    u, s, v = jnp.linalg.svd(m, full_matrices=False)
    is_rounding = s <= max(m.shape) * jnp.finfo(s.dtype).eps * s[0]
    return (jnp.where(is_rounding[None], 0, u) @ v).reshape(x.shape)


def _nuclear(x: jax.Array) -> jax.Array:
    u, s, v = jnp.linalg.svd(_unit_matrix(x), full_matrices=False)
    return jnp.where(s[0] > 0, u[:, :1] @ v[:1], 0).reshape(x.shape)


_BALLS = {
    "linf": jnp.sign,
    "l2": _l2,
    "l1": _l1,
    "spectral": _spectral,
    "nuclear": _nuclear,
}


def _ball(x: jax.Array, norm: str, ns_steps: int | None = None) -> jax.Array:
    """The direction for x; `ns_steps` of Newton-Schulz in place of an SVD."""
    if x.size == 0:
        return x
    if norm in ("spectral", "nuclear") and x.ndim < 2:
        norm = "l2"
    if norm == "spectral" and ns_steps is not None:
        return newton_schulz(_unit_matrix(x), steps=ns_steps).reshape(x.shape)
    return _BALLS[norm](x)


@catalogued(
    title=_TITLE,
    arxiv="2503.12645",
    kind="helper",
    variant="the maximiser, without the minus sign of a linear minimisation oracle.",
    compared="dual norms; goldens trust_region_*",
    example=lambda: {"x": jnp.ones((2, 3)), "norm": "spectral"},
)
def lmo(x: jax.Array, norm: str) -> jax.Array:
    r"""The point of a unit ball that lies furthest along x.

    .. math:: \arg\max_{\|d\| \le 1} \langle x, d \rangle

    Args:
      x: array; of rank above 2, it is the matrix [prod(shape[:-1]), shape[-1]].
      norm: "linf": sign(x). "l2": x / norm(x). "l1": the sign of the largest entry, the
        first one on ties, 0 elsewhere. "spectral": U V^T for x = U S V^T, over the
        singular values that are not rounding. "nuclear": u_1 v_1^T. An array of rank
        below 2 has the last two equal to "l2".

    Returns:
      An array like x of norm 1, exact to rounding; 0 for x = 0.

    Raises:
      ValueError: for an unknown norm.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> print(ox.lmo(jnp.array([3.0, -4.0]), "l1"))
      [ 0. -1.]
    """
    check_choice("lmo", "norm", norm, _BALLS)
    return _ball(x.astype(computing_dtype(x)), norm).astype(x.dtype)


def _norms(owner: str, norm: Any, like: Any) -> Any:
    """The name of a norm at each leaf of `like`."""
    if not callable(norm):
        return jax.tree.map(
            lambda name, tree: jax.tree.map(lambda _: name, tree, is_leaf=is_unit),
            norm,
            like,
        )

    def of_leaf(path, leaf):
        del leaf
        name = norm(jax.tree_util.keystr(path))
        check_choice(owner, f"norm at {jax.tree_util.keystr(path)}", name, _BALLS)
        return name

    return jax.tree_util.tree_map_with_path(of_leaf, like, is_leaf=is_unit)


class TrustRegionState(NamedTuple):
    """State of `scale_by_trust_region`."""

    count: jax.Array
    mu: optax.Updates


@catalogued(
    title=_TITLE,
    arxiv="2503.12645",
    kind="link",
    state="1 (momentum)",
    slots=1,
    variant="momentum starts at the first gradient, as in the theory; optax's signum "
    "and muon start it at 0.",
    compared="goldens trust_region_spectral, _l2, _linf, _l1, _nuclear",
)
def scale_by_trust_region(
    norm: Norm = "spectral",
    b1: float = 0.9,
    scope: str = "leaf",
    spectral_method: str = "newton_schulz",
    ns_steps: int = 5,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The direction of unit norm that lies furthest along the momentum.

    .. math::
      m_0 = g_0, \qquad m_t = b_1 m_{t-1} + (1 - b_1) g_t, \qquad
      u_t = \arg\max_{\|d\| \le 1} \langle m_t, d \rangle

    The direction does not depend on the scale of the gradient.

    Args:
      norm: a name as in `lmo` ("spectral", "nuclear", "l2", "l1", "linf"), or one for
        each leaf: a tree of names (a prefix of the parameters will do), or a function
        of the leaf's path, a text such as ``"['dense']['kernel']"``.
      b1: decay rate of the momentum, in [0, 1); 1 - b1 is the paper's alpha, which its
        theory sets from the noise. 0.9 is a practical choice.
      scope: "leaf", or "global": all leaves of norm "l2" are one vector, and all of
        norm "l1" are one. The other norms are the same either way.
      spectral_method: "newton_schulz", Muon's iteration, whose singular values end
        between about 0.7 and 1.2; "svd" is exact and slow.
      ns_steps: steps of the iteration, 1 or more (Muon: 5).
      mu_dtype: dtype of the momentum; None keeps float32.

    Returns:
      A link that emits the un-negated direction.

    Raises:
      ValueError: for unknown names, or numbers outside their range.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> norm = lambda path: "linf" if "embed" in path else "l2"
      >>> tx = ox.scale_by_trust_region(norm)
      >>> grads = {"embed": jnp.array([3.0, -4.0]), "head": jnp.array([3.0, -4.0])}
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> print(updates["embed"], updates["head"])
      [ 1. -1.] [ 0.6 -0.8]
    """
    owner = "scale_by_trust_region"
    for name in [] if callable(norm) else jax.tree.leaves(norm):
        check_choice(owner, "norm", name, _BALLS)
    check_rate(owner, b1=b1)
    check_choice(owner, "scope", scope, ("leaf", "global"))
    check_choice(owner, "spectral_method", spectral_method, ("newton_schulz", "svd"))
    check_interval(owner, ns_steps=ns_steps)
    steps = ns_steps if spectral_method == "newton_schulz" else None

    def init(params):
        (mu,) = init_leaves(lambda p: (jnp.zeros_like(p, mu_dtype),), params, 1)
        return TrustRegionState(jnp.zeros([], jnp.int32), mu)

    def update(updates, state, params=None, **extra):
        del params, extra
        names = _norms(owner, norm, updates)

        def rule(g, slots, name):
            m = jnp.where(state.count == 0, g, b1 * slots[0] + (1 - b1) * g)
            return _ball(m, name, steps), (m,)

        out, (mu,) = map_leaves(rule, updates, (state.mu,), (names,))
        if scope == "global":
            for name in ("l1", "l2"):
                view = FlatView(_only(name, names, updates), owner)
                out = view.back(_ball(view.to(mu), name), out)
        return out, TrustRegionState(next_count(state.count), mu)

    return optax.GradientTransformationExtraArgs(init, update)


def _only(name: str, names: Any, updates: Any) -> Any:
    """The leaves of one norm, and holes."""
    leaves, (each,), treedef = flatten_like(updates, names)
    pairs = zip(leaves, each, strict=True)
    return treedef.unflatten(
        [u if n == name and not is_hole(u) else None for u, n in pairs]
    )


@catalogued(
    title=_TITLE,
    arxiv="2503.12645",
    kind="optimizer",
    state="1 (momentum)",
    slots=1,
    needs=("params",),
    variant="decay multiplied by the learning rate: the paper's beta = lr wd.",
    compared="goldens trust_region_spectral, _l2, _linf, _l1, _nuclear",
    example=lambda: {"learning_rate": 0.01},
)
def norm_trust_region(
    learning_rate: optax.ScalarOrSchedule,
    norm: Norm = "spectral",
    b1: float = 0.9,
    weight_decay: float = 0.0,
    mask: Any = None,
    scope: str = "leaf",
    spectral_method: str = "newton_schulz",
    ns_steps: int = 5,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Trust-region steps in a norm of choice, with decoupled decay.

    .. math:: x_t = (1 - \eta_t \lambda) x_{t-1} - \eta_t u_t

    with u from `scale_by_trust_region`. With decay, weights that start in the ball of
    radius 1 / wd stay there. For the second-order variant of the paper, which
    evaluates the gradient ahead of the weights, put `scale_by_trust_region(b1=0.0)`
    inside an implicit gradient transport.

    Args:
      learning_rate: number or schedule; the length of a step in the norm.
      norm: as in `scale_by_trust_region`.
      b1: decay rate of the momentum, in [0, 1).
      weight_decay: decoupled decay, multiplied by the learning rate.
      mask: which leaves decay, as in `optax.add_decayed_weights`.
      scope: as in `scale_by_trust_region`.
      spectral_method: as in `scale_by_trust_region`.
      ns_steps: as in `scale_by_trust_region`.
      mu_dtype: dtype of the momentum; None keeps float32.

    Returns:
      A finished optimizer.

    Raises:
      ValueError: for unknown names, or numbers outside their range.

    Example:
      >>> import optax_ext as ox
      >>> tx = ox.norm_trust_region(0.02, norm="linf", weight_decay=0.1)
    """
    return finish(
        scale_by_trust_region(norm, b1, scope, spectral_method, ns_steps, mu_dtype),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        mask=mask,
        owner="norm_trust_region",
    )
