"""A second function beside the loss: a cheap proxy of it, or a score of the step.

`proxy_prox` takes many steps on a cheap loss for each gradient of the expensive one;
`adaptive_eta` tunes its step size on a score that it follows uphill.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_hyperparam, check_interval, check_params
from optax_ext._core.extra_args import require
from optax_ext._core.leaves import init_leaves, map_leaves
from optax_ext._core.states import scalar_dtype


@catalogued(
    title="Two Losses Are Better Than One: Faster Optimization Using a Cheaper Proxy",
    arxiv="2302.03542",
    kind="wrapper",
    needs=("params", "proxy_value_fn"),
    variant="the inner optimizer starts afresh at every outer step.",
    compared="golden proxy_prox; closed forms on quadratics",
    example=lambda: {"inner": optax.sgd(0.1), "inner_steps": 2},
    terminal=True,
)
def proxy_prox(
    inner: optax.GradientTransformation, prox_step: float = 1.0, inner_steps: int = 20
) -> optax.GradientTransformationExtraArgs:
    r"""Take many steps on a cheap proxy h for each gradient of the expensive loss f.

    From y = x, `inner_steps` times:

    .. math::
      y \leftarrow y + \text{inner}\bigl(\nabla h(y) + \nabla f(x) - \nabla h(x)
      + (y - x) / \eta \bigr)

    and y is the next x. It minimises h, corrected to the slope of f at x and held near
    x: f costs one gradient a step, h costs inner_steps + 1.

    Args:
      inner: a whole optimizer, made for this inner problem. It also gets the inner
        gradient as ``grad``; other extra arguments stay those at x.
      prox_step: eta, above 0; about 1/delta where f - h is delta-smooth, smaller with
        noisy gradients. The default is a placeholder: tune it.
      inner_steps: steps on the proxy; a placeholder too.

    Returns:
      A link without state that needs params and the extra argument ``proxy_value_fn``,
      params -> h.

    Raises:
      ValueError: for hyper-parameters outside their range; at trace time without params
        or ``proxy_value_fn``.

    Example:
      >>> import jax.numpy as jnp, optax, optax_ext as ox
      >>> f = h = lambda x: jnp.sum(x**2) / 2
      >>> tx = ox.proxy_prox(optax.sgd(0.5), prox_step=1.0, inner_steps=50)
      >>> x = jnp.array([1.0, 3.0])
      >>> updates, _ = tx.update(x, tx.init(x), x, proxy_value_fn=h)
      >>> print(optax.apply_updates(x, updates))
      [0.5 1.5]
    """
    check_hyperparam("proxy_prox", low=0.0, open_low=True, prox_step=prox_step)
    check_interval("proxy_prox", inner_steps=inner_steps)
    inner = optax.with_extra_args_support(inner)

    def zeros(p):
        return (jnp.zeros_like(p),)

    def shift(p, slots, moved):
        return p + moved, slots

    def slope(g, slots, moved, here, there):
        return there + (g - here) + moved / prox_step, slots

    def advance(u, slots):
        (moved,) = slots
        return u, (moved + u,)

    def update(updates, state, params: Any = None, **extra):
        check_params("proxy_prox", params)
        proxy_grad = jax.grad(require("proxy_prox", extra, "proxy_value_fn"))
        here = proxy_grad(params)

        def step(carry, _):
            moved, inner_state = carry
            y, _ = map_leaves(shift, params, (), (moved,))
            g, _ = map_leaves(slope, updates, (), (moved, here, proxy_grad(y)))
            arguments = {**extra, "grad": g}
            u, inner_state = inner.update(g, inner_state, y, **arguments)
            return (map_leaves(advance, u, (moved,))[1][0], inner_state), None

        start = (*init_leaves(zeros, params, 1), inner.init(params))
        (moved, _), _ = jax.lax.scan(step, start, length=inner_steps)
        out, _ = map_leaves(lambda g, s, moved: (moved, s), updates, (), (moved,))
        return out, state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update
    )


class AdaptiveEtaState(NamedTuple):
    """State of `adaptive_eta`: the step size of the last step."""

    eta: jax.Array
    inner_state: optax.OptState


@catalogued(
    title="Bidirectional Learning for Offline Model-based Biological Sequence Design",
    arxiv="2301.02931",
    kind="wrapper",
    needs=("params", "aux_value_fn"),
    state="that of inner",
    variant="from the abstract: one ascent step on the score, then the step with the "
    "new eta.",
    compared="golden adaptive_eta",
    example=lambda: {"inner": optax.identity(), "init_eta": 0.1, "eta_lr": 0.001},
)
def adaptive_eta(
    inner: optax.GradientTransformation, init_eta: float, eta_lr: float
) -> optax.GradientTransformationExtraArgs:
    r"""Learn the step size by following a score s of where the step leads, uphill.

    With d the direction of `inner`:

    .. math::
      \eta_t = \max\Bigl(\eta_{t-1} + \text{eta\_lr}\, \frac{\partial}{\partial \eta}
      s(x - \eta d) \Big|_{\eta_{t-1}}, 0\Bigr), \qquad \text{out} = -\eta_t d

    It is the end of a chain: the learning rate is eta. At eta = 0 the parameters stand
    still, but eta can grow again. Where the score has no finite slope eta stays.

    Args:
      inner: a link that emits the un-negated direction; ``optax.identity()`` for the
        plain gradient.
      init_eta: the first step size, 0 or more.
      eta_lr: step size of eta; 0 is plain descent with `init_eta`.

    Returns:
      A finished optimizer that needs params and the extra argument ``aux_value_fn``,
      params -> s, which costs one gradient.

    Raises:
      ValueError: for hyper-parameters below 0; at trace time without params or
        ``aux_value_fn``.

    Example:
      >>> import jax.numpy as jnp, optax, optax_ext as ox
      >>> tx = ox.adaptive_eta(optax.identity(), init_eta=0.5, eta_lr=0.25)
      >>> x = jnp.array([1.0])
      >>> score = lambda x: -x[0] ** 2
      >>> updates, state = tx.update(x, tx.init(x), x, aux_value_fn=score)
      >>> print(updates, state.eta)
      [-0.75] 0.75
    """
    check_hyperparam("adaptive_eta", low=0.0, init_eta=init_eta, eta_lr=eta_lr)
    inner = optax.with_extra_args_support(inner)

    def init(params):
        eta = jnp.array(init_eta, scalar_dtype(params))
        return AdaptiveEtaState(eta, inner.init(params))

    def update(updates, state, params=None, **extra):
        check_params("adaptive_eta", params)
        score = require("adaptive_eta", extra, "aux_value_fn")
        d, inner_state = inner.update(updates, state.inner_state, params, **extra)

        def move(p, slots, d, eta):
            return p - eta.astype(p.real.dtype) * d, slots

        def after(eta):
            to = map_leaves(lambda p, s, d: move(p, s, d, eta), params, (), (d,))[0]
            return score(to)

        eta = jnp.maximum(state.eta + eta_lr * jax.grad(after)(state.eta), 0)
        eta = jnp.where(jnp.isfinite(eta), eta, state.eta)
        out, _ = map_leaves(lambda u, s: (-eta.astype(u.real.dtype) * u, s), d)
        return out, AdaptiveEtaState(eta, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
