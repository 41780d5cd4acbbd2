"""Trion: an orthogonalised momentum, in the cosine vectors that fit it best."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import (
    check_choice,
    check_hyperparam,
    check_interval,
    check_rate,
)
from optax_ext._core.leaves import leafwise
from optax_ext._core.matrices import matrix_shape
from optax_ext._core.newton_schulz import newton_schulz
from optax_ext.curvature._subspace import (
    best_rows,
    check_cosines,
    cosine_basis,
    small_side_first,
)
from optax_ext.curvature.dct import TITLE

_SCALINGS = {
    "kj": lambda rows, columns: max(1, columns / rows) ** 0.5,
    "none": lambda rows, columns: 1.0,
    "kimi": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "dion": lambda rows, columns: (columns / rows) ** 0.5,
}


class TrionState(NamedTuple):
    """State of `scale_by_trion`."""

    mu: optax.Updates


@catalogued(
    title=TITLE,
    arxiv="2505.17967",
    kind="link",
    state="1 (momentum)",
    slots=1,
    variant="columns of Q on both sides; the released code takes rows where inputs "
    "outnumber outputs, and iterates in bfloat16.",
    compared="golden trion",
    example=lambda: {"rank": 2},
    matrices=True,
)
def scale_by_trion(
    rank: int,
    momentum: float = 0.95,
    ns_steps: int = 5,
    eps: float = 1e-7,
    norm_ord: int = 1,
    basis: str = "dct3",
    scaling: str = "kj",
) -> optax.GradientTransformationExtraArgs:
    r"""Orthogonalise the momentum in the `rank` cosine vectors that fit it best.

    With the matrix turned so that its smaller side (the inputs on ties) is axis 0:

    .. math::
      B_t = M_{t-1} + G_t, \quad S = Q^T B_t, \quad
      I = \text{largest rows of } S, \quad
      u_t = c\, Q_{:, I}\, \text{NS}(S_I), \quad
      M_t = B_t - (1 - \mu) Q_{:, I} S_I

    What the subspace leaves out stays in the momentum whole. The factor c is
    max(1, out/in)^0.5 for "kj", 0.2 max(in, out)^0.5 for "kimi", (out/in)^0.5 for
    "dion", 1 for "none".

    Args:
      rank: number of cosine vectors a matrix, cut to its smaller side.
      momentum: mu, what stays in the momentum of the part that was used, in [0, 1)
        (official).
      ns_steps: Newton-Schulz iterations (official).
      eps: added to the norm before them (official).
      norm_ord: 1 or 2, the norm that measures rows (official: 1).
      basis: "dct3", or "dct2" for its transpose.
      scaling: "kj" (Muon's), "kimi", "dion" or "none"; the official class has no
        default.

    Returns:
      A link that emits the un-negated direction. Leaves must have rank 2 or more.

    Raises:
      ValueError: for hyper-parameters outside their range; in `init` and `update` for
        leaves of rank 0 and 1.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> tx = ox.scale_by_trion(rank=1, scaling="none")
      >>> g = ox.dct_matrix(4)[:, 2:3] * jnp.array([[3.0, 4.0]])
      >>> updates, _ = tx.update(g, tx.init(g))
      >>> print(0.6 < jnp.linalg.norm(updates) < 1.2)
      True
    """
    owner = "scale_by_trion"
    check_rate(owner, momentum=momentum)
    check_hyperparam(owner, low=0.0, eps=eps)
    check_interval(owner, rank=rank, ns_steps=ns_steps)
    check_choice(owner, "scaling", scaling, _SCALINGS)
    check_cosines(owner, norm_ord, basis)

    def init(p):
        if p.ndim < 2:
            raise ValueError(
                f"a leaf of rank {p.ndim} is no matrix: send it to another optimizer "
                "with optax.partition, or use optax_ext.as_matrices"
            )
        return (jnp.zeros_like(p),)

    def update(g, slots, p, t):
        del p, t
        momenta, back = small_side_first(slots[0] + g)
        q = cosine_basis(basis, momenta.shape[0], g.dtype)
        s = q.T @ momenta
        best, _ = best_rows(s, min(rank, s.shape[0]), norm_ord)
        q, low = q[:, best], s[best]
        m = back(momenta - (1 - momentum) * (q @ low))
        u = back(q @ newton_schulz(low, steps=ns_steps, eps=eps))
        return _SCALINGS[scaling](*matrix_shape(g.shape)) * u, (m,)

    return leafwise(TrionState, init, update)
