"""Averages of the iterates, kept beside the training."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam, check_params
from optax_ext._core.leaves import init_leaves, map_leaves
from optax_ext._core.states import find_state, scalar_dtype


class KalmanState(NamedTuple):
    """State of `kalman_average_params`: estimate, its variance, the last gain."""

    average: Any
    variance: jax.Array
    gain: jax.Array


@catalogued(
    title="Extended Linear Regression: A Kalman Filter Approach for Minimizing Loss "
    "via Area Under the Curve",
    arxiv="2308.12280",
    kind="link",
    needs=("params",),
    state="1 (average) and 2 scalars",
    slots=1,
    variant="the scalar random-walk filter; the paper's own filter and area rule are "
    "not recoverable from it.",
    compared="golden kalman_average_params; steady-state gain; running mean at Q = 0",
    terminal=True,
)
def kalman_average_params(
    process_noise: float = 1e-4,
    observation_noise: float = 1e-2,
    initial_variance: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Average the iterates with the gain of a Kalman filter.

    The iterates w = x + u are noisy observations (variance R) of a random walk (Q):

    .. math::
      P \leftarrow P + Q, \qquad K = \frac{P}{P + R}, \qquad
      \bar x \leftarrow \bar x + K (w - \bar x), \qquad P \leftarrow (1 - K) P

    K does not depend on the data: this is an exponential average whose rate falls from
    about 1 to a limit, 0.095 at the defaults, with no bias to correct. Only the ratios
    of the three variances count. Updates pass unchanged; `kalman_params` reads the
    average.

    Args:
      process_noise: Q, how fast the true parameters move, 0 or more; 0 makes a running
        mean. The defaults are ours.
      observation_noise: R, above 0.
      initial_variance: P at the start, 0 or more; a large one forgets the initial
        parameters at once.

    Returns:
      A link to put last, after the learning rate.

    Raises:
      ValueError: for variances outside their range; without params.

    Example:
      >>> import jax.numpy as jnp, optax, optax_ext as ox
      >>> tx = optax.chain(optax.sgd(0.5), ox.kalman_average_params(1.0, 2.0, 1.0))
      >>> x = jnp.array([1.0])
      >>> updates, state = tx.update(x, tx.init(x), x)
      >>> print(updates, ox.kalman_params(state))
      [-0.5] [0.75]
    """
    owner = "kalman_average_params"
    check_hyperparam(
        owner, low=0.0, process_noise=process_noise, initial_variance=initial_variance
    )
    check_hyperparam(owner, low=0.0, open_low=True, observation_noise=observation_noise)

    def init_leaf(p):
        return (p,)

    def init(params):
        dtype = scalar_dtype(params)
        (average,) = init_leaves(init_leaf, params, 1)
        return KalmanState(
            average, jnp.array(initial_variance, dtype), jnp.zeros((), dtype)
        )

    def update(updates, state, params=None, **extra):
        del extra
        check_params(owner, params)
        variance = state.variance + process_noise
        gain = variance / (variance + observation_noise)

        def rule(u, slots, p):
            (average,) = slots
            step = gain.astype(u.real.dtype) * (p + u - average)
            return u, (average + step,)

        _, (average,) = map_leaves(rule, updates, (state.average,), (params,))
        # (1 - K) P = K R, which does not cancel where K is near 1.
        return updates, KalmanState(average, gain * observation_noise, gain)

    return optax.GradientTransformationExtraArgs(init, update)


def kalman_params(state: optax.OptState) -> Any:
    """The averaged parameters that `kalman_average_params` keeps.

    Args:
      state: any optimizer state that holds one `KalmanState`.

    Returns:
      A tree like params, in float32 or wider; masked leaves are missing in it.

    Raises:
      ValueError: if there is no `KalmanState`, or more than one.

    Example:
      >>> import jax.numpy as jnp, optax, optax_ext as ox
      >>> tx = optax.chain(optax.sgd(0.1), ox.kalman_average_params())
      >>> print(ox.kalman_params(tx.init(jnp.ones(2))))
      [1. 1.]
    """
    return find_state("kalman_params", state, KalmanState).average
