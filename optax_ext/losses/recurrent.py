r"""Recurrent networks: keep the gradient alive through time, and from exploding.

Back through T steps a gradient is multiplied with T Jacobians, and vanishes or explodes
with them.

| the gradient | reach for | it acts on |
|---|---|---|
| vanishes | `vanishing_gradient_regularizer` | the recurrent weights |
| explodes, now and then | `optax.clip_by_global_norm` | the gradient |
| explodes: the dynamics are chaotic | `generalized_teacher_forcing_rollout` | states |

The rollout mixes a share alpha of the data into every state, which multiplies each
Jacobian with 1 - alpha. `optimal_forcing` reads the least share that is enough from
Jacobians, and `update_forcing` follows it during training.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_choice, check_hyperparam
from optax_ext.losses._numerics import masked_mean, norm_of, working_floats

_GTF = "Generalized Teacher Forcing for Learning Chaotic Dynamics"


@catalogued(
    title="On the difficulty of training Recurrent Neural Networks",
    arxiv="1211.5063",
    kind="loss",
    needs=("recurrent_kernel", "activation_grads", "error_signals"),
    variant="the paper's ratio of norms, averaged as in the official code, whose ratio "
    "of squares is an option",
    compared="golden vanishing_gradient_regularizer; closed form for c times an "
    "orthogonal kernel",
    example=lambda: {
        "recurrent_kernel": jnp.array([[0.5, 0.2], [-0.1, 0.8]]),
        "activation_grads": jnp.array([[[1.0, 0.5]], [[0.2, 1.0]], [[0.9, 0.9]]]),
        "error_signals": jnp.array([[[0.1, -0.5]], [[0.3, 0.2]], [[1.0, 0.0]]]),
    },
)
def vanishing_gradient_regularizer(
    recurrent_kernel: chex.Array,
    activation_grads: chex.Array,
    error_signals: chex.Array,
    *,
    squared_ratio: bool = False,
    reduction: str = "mean",
    bound: chex.Numeric = 1e-20,
) -> jax.Array:
    r"""Penalty on errors that change their length as they go back one step in time.

    For :math:`h_t = \mathrm{act}(h_{t-1} W + \ldots)`, with errors
    :math:`\delta_t = \partial E / \partial h_t` and slopes :math:`a_t` of the
    activation,

    .. math::
      \Omega_t = \left(\frac{|(\delta_t \odot a_t) W^T|}{|\delta_t|} - 1\right)^2.

    Gradients go to W alone, not through errors and slopes, as in the paper. Errors come
    from the gradient of the loss in zeros that are added to every state. For a cell
    :math:`x_{t+1} = \mathrm{act}(x_t) W + \ldots` on pre-activations, the slopes act
    behind the kernel: pass ones, and errors of ``act(x_t)``.

    Args:
      recurrent_kernel: W, [n, n], applied to rows from the right.
      activation_grads: a_t, [T, B, n]. Detached.
      error_signals: delta_t, [T, B, n]. Detached.
      squared_ratio: whether to square the ratio before 1 is subtracted, as the official
        code does.
      reduction: "mean" is over time and batch, without the pairs left out; "sum" is
        over time, with a mean over the batch.
      bound: pairs with :math:`|\delta_t|^2` below it are left out; 1e-20 as in the
        official code.

    Returns:
      The penalty of the batch, a scalar. Its weight was 2 in the official code, with
      `squared_ratio` and gradients clipped to 1.

    Raises:
      AssertionError: for shapes that do not fit, or arguments that are not floats.
      ValueError: for an unknown reduction, or a bound that is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> errors = jnp.ones((6, 2, 3))
      >>> kernel = 0.5 * jnp.eye(3)
      >>> print(ox.losses.vanishing_gradient_regularizer(
      ...     kernel, jnp.ones_like(errors), errors))
      0.25
    """
    owner = "vanishing_gradient_regularizer"
    check_choice(owner, "reduction", reduction, ("mean", "sum"))
    check_hyperparam(owner, low=0.0, open_low=True, bound=bound)
    kernel, slopes, errors = working_floats(
        recurrent_kernel=recurrent_kernel,
        activation_grads=activation_grads,
        error_signals=error_signals,
    )
    chex.assert_rank(errors, 3, custom_message="error_signals")
    n = errors.shape[-1]
    chex.assert_shape(kernel, (n, n), custom_message="recurrent_kernel")
    message = "activation_grads, error_signals"
    chex.assert_equal_shape([slopes, errors], custom_message=message)

    slopes, errors = jax.lax.stop_gradient((slopes, errors))
    kept = jnp.sum(errors**2, -1) >= jnp.asarray(bound, errors.dtype)
    # The ratio does not depend on the size of the errors, but its squares overflow.
    largest = jnp.max(jnp.abs(errors), -1, keepdims=True)
    errors = jnp.where(kept[..., None], errors / jnp.where(largest > 0, largest, 1), 1)
    ratio = norm_of((errors * slopes) @ kernel.T) / norm_of(errors)
    terms = ((ratio**2 if squared_ratio else ratio) - 1) ** 2
    if reduction == "mean":
        return masked_mean(terms, kept, axis=None)
    return jnp.mean(jnp.sum(jnp.where(kept, terms, 0), 0))


@catalogued(
    title=_GTF,
    arxiv="2306.04406",
    kind="helper",
    needs=("initial_state", "forced_states"),
    variant="predictions before they are blended; the data state may be the first "
    "features of the model's",
    compared="golden generalized_teacher_forcing; Jacobians of Lorenz-63",
    example=lambda: {
        "step_fn": jnp.tanh,
        "initial_state": jnp.array([[0.5, -1.0], [1.0, 0.2], [0.0, 0.3]]),
        "forced_states": jnp.ones((3, 3, 2)) / 2,
        "alpha": 0.25,
    },
)
def generalized_teacher_forcing_rollout(
    step_fn: Callable[[Any], Any],
    initial_state: chex.Array,
    forced_states: chex.Array,
    alpha: chex.Numeric,
) -> jax.Array:
    r"""Run a model with a share of the data mixed into each state.

    .. math::
      p_t = f(z_{t-1}), \qquad z_t = (1 - \alpha)\, p_t + \alpha\, \tilde z_t

    Alpha = 1 is teacher forcing, 0 a free run. The Jacobian of the rollout is
    :math:`\prod_t (1 - \alpha) J_t`.

    Args:
      step_fn: f, from a state to the next, [..., M] -> [..., M].
      initial_state: z_0, the data state before the first step, [..., M].
      forced_states: data states, [T, ..., F]. Where F < M, only the first F features
        are blended, and the rest stay free.
      alpha: share of the data, in [0, 1].

    Returns:
      The predictions p_t, before they are blended, [T, ..., M]. The loss is the mean
      squared error of their observations and the data at their time.

    Raises:
      AssertionError: for shapes that do not fit, or arguments that are not floats.
      ValueError: for an alpha outside [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> predictions = ox.losses.generalized_teacher_forcing_rollout(
      ...     lambda z: 2 * z, jnp.array([1.0]), jnp.zeros((3, 1)), alpha=0.5)
      >>> print(predictions[:, 0])
      [2. 2. 2.]
    """
    owner = "generalized_teacher_forcing_rollout"
    check_hyperparam(owner, low=0.0, high=1.0, alpha=alpha)
    state, forced = working_floats(
        initial_state=initial_state, forced_states=forced_states
    )
    features = forced.shape[-1]
    message = "forced_states must be [T, ..., F] for an initial_state of [..., M]"
    chex.assert_shape(forced, (None, *state.shape[:-1], None), custom_message=message)
    chex.assert_axis_dimension_gteq(state, -1, features, custom_message=message)
    share = jnp.asarray(alpha, state.dtype)

    def step(z: jax.Array, data: jax.Array) -> tuple[jax.Array, jax.Array]:
        p = step_fn(z)
        blended = (1 - share) * p[..., :features] + share * data
        return jnp.concatenate([blended, p[..., features:]], axis=-1), p

    return jax.lax.scan(step, state, forced)[1]


@catalogued(
    title=_GTF,
    arxiv="2306.04406",
    kind="helper",
    needs=("jacobians",),
    variant="the three estimates of the official code, largest over the batch",
    compared="golden optimal_forcing; closed forms",
    example=lambda: {
        "jacobians": jnp.array([[[[1.5, 0.1], [0.0, 0.5]], [[2.0, 0.0], [0.3, 1.0]]]])
    },
)
def optimal_forcing(jacobians: chex.Array, *, method: str = "product") -> jax.Array:
    r"""The share of the data that keeps gradients from exploding.

    .. math:: \alpha = \max(0, 1 - 1 / N),

    with N the largest, over the batch, of: the geometric mean over time of the spectral
    norms ("product"), the spectral norms themselves ("max"), or the spectral norm of
    the mean over time ("mean").

    Args:
      jacobians: of the model's step along data states, [batch, time, M, M].
      method: "product" as in the official code, "max" or "mean".

    Returns:
      Alpha, a scalar. No gradient flows through it.

    Raises:
      AssertionError: for another rank, or arguments that are not floats.
      ValueError: for an unknown method.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_ext as ox
      >>> jacobians = jnp.array([1.0, 4.0])[None, :, None, None] * jnp.eye(2)
      >>> print(ox.losses.optimal_forcing(jacobians))  # sqrt(1 * 4) = 2
      0.5
      >>> print(ox.losses.optimal_forcing(jacobians, method="max"))
      0.75
    """
    check_choice("optimal_forcing", "method", method, ("product", "max", "mean"))
    (jacobians,) = working_floats(jacobians=jacobians)
    chex.assert_rank(jacobians, 4, custom_message="jacobians")

    jacobians = jax.lax.stop_gradient(jacobians)
    over_time = jnp.mean(jacobians, 1) if method == "mean" else jacobians
    norms = jnp.linalg.norm(over_time, ord=2, axis=(-2, -1))
    if method == "product":
        norms = jnp.exp(jnp.mean(jnp.log(norms), 1))
    largest = jnp.max(norms)
    return jnp.maximum(0, 1 - 1 / jnp.maximum(largest, 1))


@catalogued(
    title=_GTF,
    arxiv="2306.04406",
    kind="helper",
    needs=("alpha", "estimate"),
    variant="the official code: up at once, down slowly",
    compared="golden optimal_forcing",
    example=lambda: {"alpha": jnp.float32(0.3), "estimate": jnp.float32(0.1)},
)
def update_forcing(
    alpha: chex.Numeric, estimate: chex.Numeric, *, decay: chex.Numeric = 0.999
) -> jax.Array:
    r"""Follow estimates of the forcing: up at once, down slowly.

    .. math::
      \alpha \leftarrow \begin{cases}
        e & e > \alpha \\
        d\, \alpha + (1 - d)\, e & \text{else}
      \end{cases}

    Args:
      alpha: the present share; training starts from 1.
      estimate: e, from `optimal_forcing`, every 5 updates in the official code.
      decay: d, in [0, 1]; 0.999 as in the official code.

    Returns:
      The next alpha, a scalar. No gradient flows through it.

    Raises:
      AssertionError: if alpha and estimate are not floats.
      ValueError: for a decay outside [0, 1].

    Example:
      >>> import optax_ext as ox
      >>> print(ox.losses.update_forcing(0.5, 0.75))
      0.75
      >>> print(ox.losses.update_forcing(0.5, 0.25, decay=0.5))
      0.375
    """
    check_hyperparam("update_forcing", low=0.0, high=1.0, decay=decay)
    alpha, estimate = working_floats(alpha=alpha, estimate=estimate)
    d = jnp.asarray(decay, alpha.dtype)
    slow = d * alpha + (1 - d) * estimate
    return jax.lax.stop_gradient(jnp.where(estimate > alpha, estimate, slow))
