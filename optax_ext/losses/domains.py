"""Losses over several domains at once, for what holds in all of them.

| function | aligns | price |
|---|---|---|
| `idgm_loss` | gradients of all parameters, by inner products | S hvps |
| `hessian_alignment_loss` | gradients and Hessians of the head | S + 1 of the head |

`optax_ext.fish` approximates the first without second derivatives.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import check_choice, check_hyperparam, check_interval
from optax_ext._core.trees import computing_dtype


@catalogued(
    title="Gradient Matching for Domain Generalization",
    arxiv="2104.09937",
    kind="helper",
    needs=("per_domain_losses_fn",),
    variant="exact, with second derivatives; `optax_ext.fish` approximates it.",
    compared="closed form on quadratics; the expansion of fish",
    example=lambda: {
        "per_domain_losses_fn": lambda x: jnp.stack([jnp.sum(x**2), jnp.sum(x)]),
        "gamma": 0.1,
    },
)
def idgm_loss(
    per_domain_losses_fn: Callable[..., jax.Array], gamma: float
) -> Callable[..., jax.Array]:
    r"""Reward gradients of the domains that point the same way.

    With S domains, losses L_i and their gradients G_i with respect to all parameters:

    .. math::
      L = \frac1S \sum_i L_i - \gamma\, \frac{2}{S(S-1)} \sum_{i<j} \langle G_i, G_j
      \rangle

    Its gradient costs S Hessian-vector products. One domain alone has no pairs.

    Args:
      per_domain_losses_fn: ``(params, *args) -> losses`` [domains].
      gamma: weight of the inner products; above 0 to align gradients.

    Returns:
      A function of the same arguments that returns a scalar, in float32 or wider.

    Raises:
      TypeError: for a `gamma` that is no number.
      AssertionError: at the call, if the losses are no vector.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> def losses(x):
      ...     return jnp.stack([jnp.sum(x**2), 3 * jnp.sum(x)])
      >>> print(ox.losses.idgm_loss(losses, gamma=0.5)(jnp.array([1.0, 2.0])))
      -2.0
    """
    check_hyperparam("idgm_loss", gamma=gamma)

    def loss_fn(params: Any, *args: Any, **kwargs: Any) -> jax.Array:
        def losses_of(params):
            losses = per_domain_losses_fn(params, *args, **kwargs)
            chex.assert_rank(
                losses, 1, custom_message="per_domain_losses_fn must return a vector"
            )
            return losses.astype(computing_dtype(losses))

        losses, pullback = jax.vjp(losses_of, params)
        n = losses.size
        (grads,) = jax.vmap(pullback)(jnp.eye(n, dtype=losses.dtype))
        gram = jnp.zeros((n, n), losses.dtype)
        for leaf in jax.tree.leaves(grads):
            rows = leaf.reshape(n, -1).astype(computing_dtype(losses, leaf))
            products = jnp.matmul(rows, rows.T, precision="highest")
            gram += products.astype(losses.dtype)
        agreement = jnp.sum(jnp.triu(gram, 1)) / max(n * (n - 1) / 2, 1)
        return jnp.mean(losses) - gamma * agreement

    return loss_fn


def _head_loss(head: jax.Array, batch: jax.Array) -> jax.Array:
    return jnp.mean(jnp.cos(batch @ head))


@catalogued(
    title="Understanding Hessian Alignment for Domain Generalization",
    arxiv="2308.11778",
    kind="helper",
    needs=("loss_fn", "head_params", "batches"),
    variant="the authors' DomainBed classes: the centre is that of the mean loss, "
    "detached. Their ColoredMNIST script sums over domains and detaches nothing",
    compared="goldens `hessian_alignment_loss_hgp`, "
    "`hessian_alignment_loss_hutchinson`; dense Hessians",
    example=lambda: {
        "loss_fn": _head_loss,
        "head_params": jnp.array([0.5, -1.0]),
        "batches": jnp.array([[[1.0, 2.0]], [[0.0, 1.0]], [[0.4, 0.3]]]),
    },
)
def hessian_alignment_loss(
    loss_fn: Callable[[Any, Any], jax.Array],
    head_params: Any,
    batches: Any,
    *,
    alpha: chex.Numeric = 1e-4,
    beta: chex.Numeric = 5e-3,
    mode: str = "hgp",
    probes: Any = None,
    key: chex.PRNGKey | None = None,
    num_probes: int = 100,
    stop_gradient_center: bool = True,
) -> jax.Array:
    r"""Make the domains agree on slope and curvature of the classifier head.

    With the loss L_e of domain e, its head gradient g_e, and s_e that says what the
    Hessian H_e is like:

    .. math::
      \mathrm{mean}_e \left[ L_e + \alpha \|s_e - \bar s\|^2
      + \beta \|g_e - \bar g\|^2 \right], \qquad
      s_e = H_e g_e \;\text{(hgp)} \quad\text{or}\quad
      \mathrm{mean}_v\, v \odot H_e v \;\text{(hutchinson)}

    The centre is g and s of the mean loss. For "hgp" that is not the mean of the
    products.

    Args:
      loss_fn: ``(head_params, batch) -> loss``, the mean loss of one domain. It is
        called with floats of the widest dtype among the arguments, float32 at least.
      head_params: tree of arrays, the last layer alone as a rule.
      batches: tree of arrays with a leading domain axis. Pass features computed
        outside, and the gradient flows on into what made them.
      alpha: weight of the curvature, 0 or more; 1e-4 for "hgp" and 1e-3 for
        "hutchinson" in DomainBed.
      beta: weight of the gradients, 0 or more.
      mode: "hgp", the Hessian-gradient product, or "hutchinson", the diagonal.
      probes: vectors v of signs for "hutchinson", a tree like `head_params` with a
        leading probe axis. All domains and the centre share them.
      key: where to draw the probes from, if they are not given.
      num_probes: how many to draw. The official code has 300, fresh in every domain.
      stop_gradient_center: whether the centre is a constant.

    Returns:
      A scalar, a statistic of the whole batch.

    Raises:
      AssertionError: if `loss_fn` returns no scalar.
      ValueError: for hyper-parameters outside their range, or "hutchinson" with neither
        `probes` nor `key`.

    Example:
      >>> import jax.numpy as jnp, optax_ext as ox
      >>> def loss_fn(head, target):
      ...     return jnp.sum((head - target) ** 2)
      >>> targets = jnp.array([[1.0], [-1.0]])
      >>> head = jnp.zeros(1)  # losses 1, gradients -2 and 2, Hessians alike
      >>> print(ox.losses.hessian_alignment_loss(loss_fn, head, targets, alpha=0.0,
      ...     beta=0.25))
      2.0
    """
    owner = "hessian_alignment_loss"
    check_hyperparam(owner, low=0.0, alpha=alpha, beta=beta)
    check_choice(owner, "mode", mode, ("hgp", "hutchinson"))
    check_interval(owner, num_probes=num_probes)
    dtype = computing_dtype(*jax.tree.leaves(head_params), *jax.tree.leaves(batches))

    def widened(tree):
        def widen(x):
            x = jnp.asarray(x)
            return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

        return jax.tree.map(widen, tree)

    batches, price = widened(batches), widened((alpha, beta))
    head, unravel = ravel_pytree(widened(head_params))
    if mode == "hutchinson" and probes is not None:
        probes = jax.vmap(lambda v: ravel_pytree(v)[0])(widened(probes))
    elif mode == "hutchinson":
        if key is None:
            raise ValueError(f"{owner}: hutchinson needs probes, or a key to draw them")
        probes = jax.random.rademacher(key, (num_probes, head.size), dtype)

    def loss_of(head, batch):
        loss = loss_fn(unravel(head), batch)
        chex.assert_rank(loss, 0, custom_message="loss_fn must return a scalar")
        return loss.astype(dtype)

    def mean_loss(head):
        return jnp.mean(jax.vmap(loss_of, (None, 0))(head, batches))

    def statistics(loss):
        slope = jax.grad(loss)
        g = slope(head)

        def hvp(v):
            return jax.jvp(slope, (head,), (v,))[1]

        if mode == "hgp":
            return g, hvp(g)
        return g, jnp.mean(jax.vmap(lambda v: v * hvp(v))(probes), axis=0)

    center = statistics(mean_loss)
    if stop_gradient_center:
        center = jax.lax.stop_gradient(center)

    def of_domain(batch):
        statistic = statistics(lambda head: loss_of(head, batch))
        slopes, curvatures = (
            jnp.sum((mine - mean) ** 2)
            for mine, mean in zip(statistic, center, strict=True)
        )
        return loss_of(head, batch) + price[0] * curvatures + price[1] * slopes

    return jnp.mean(jax.vmap(of_domain)(batches))
