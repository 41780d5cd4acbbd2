"""The Newton-Schulz iteration: a matrix with its singular values moved towards 1."""

import jax
import jax.numpy as jnp

from optax_ext._core.geometry import length


def newton_schulz(
    x: jax.Array,
    coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    steps: int = 5,
    eps: float = 1e-7,
) -> jax.Array:
    r"""An odd quintic polynomial, applied `steps` times to all singular values.

    .. math::
      X_0 = X / (|X|_F + \epsilon), \qquad
      X_{k+1} = a X_k + (b A + c A^2) X_k, \quad A = X_k X_k^T

    Against float64, five steps on normal matrices of 64 to 256 rows are within 2e-6 of
    the result's norm in float32 and within 8 % in bfloat16, where single singular
    values move by 0.1. The polynomial itself leaves them anywhere in 0.68 to 1.2 for
    condition numbers up to 100, and lower than that beyond.

    Args:
      x: matrices [..., m, n], in the dtype to compute in.
      coefficients: a, b, c; Muon's, which leave singular values in about 0.7 to 1.2.
      steps: number of iterations.
      eps: added to the Frobenius norm.

    Returns:
      Matrices [..., m, n]; zero matrices stay zero.
    """
    a, b, c = coefficients
    size = length(x, (-2, -1), keepdims=True) + eps
    x = x / jnp.where(size > 0, size, 1)
    tall = x.shape[-2] > x.shape[-1]  # the smaller Gram matrix has the same spectrum
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT.conj()
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
