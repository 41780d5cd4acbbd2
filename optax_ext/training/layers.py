r"""Layer inputs and output gradients of Flax models, out of the one backward pass.

Links such as `scale_by_mkor` need the mean input of each layer and the gradient of the
loss in its output. `flax_layers` finds the layers of a model, linen or nnx;
`layer_statistics` takes their statistics together with loss and gradients:

    layers = ox.training.flax_layers(loss_fn, params, *batch)
    tx = optax.chain(ox.scale_by_mkor(layers), optax.sgd(0.1))
    statistics = ox.training.layer_statistics(loss_fn, layers)

    @jax.jit
    def step(params, opt_state, *batch):
        loss, grads, extra = statistics(params, *batch)
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state, loss

For nnx, `params` is the model, and its parameters are ``nnx.state(model, nnx.Param)``.

Every layer passes its output through a probe: the identity, whose backward pass hands
out the statistics as gradients in arguments that nothing else uses. They need no place
in the model, and pass through `jax.checkpoint`, `jax.lax.scan` and `jax.vmap`.

`precondition_by_inputs` takes all inputs of a first layer, which are the batch itself:
``inputs={"kernel": im2col_inputs(images, kernel.shape, strides), "bias": None}``.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx

from optax_ext._core.matrices import matrix_shape
from optax_ext._core.trees import computing_dtype
from optax_ext.curvature._paths import LeavesByPath, Path
from optax_ext.curvature.layer_inputs import im2col_inputs

Layers = Mapping[str, tuple[Path, Path | None]]
Probe = Callable[[str, Callable[[], jax.Array], jax.Array], jax.Array]
"""(name of the layer, function that makes its mean input, its output) -> its output."""


class _Slots(NamedTuple):
    """What comes back as the gradient in zeros: sums over the calls of a layer."""

    inputs: jax.Array
    grads: jax.Array
    calls: jax.Array


@jax.custom_vjp
def _probe(z: jax.Array, mean_input: jax.Array, slots: _Slots) -> jax.Array:
    del mean_input, slots
    return z


def _probe_forward(z, mean_input, slots):
    return z, (mean_input, slots)


def _probe_backward(kept, dz):
    mean_input, slots = kept
    wide = dz.astype(slots.grads.dtype).reshape(-1, dz.shape[-1])
    # One call, whatever dz is; but vmap adds up only what depends on its axis.
    call = jnp.where(jnp.any(wide > 0), jnp.ones_like(slots.calls), 1)
    inputs = mean_input.astype(slots.inputs.dtype)
    found = _Slots(inputs, jnp.sum(wide, axis=0), call)
    return dz, jnp.zeros_like(mean_input), found


_probe.defvjp(_probe_forward, _probe_backward)


def _mean_rows(x: jax.Array) -> jax.Array:
    wide = x.astype(computing_dtype(x))
    return jnp.mean(wide.reshape(-1, x.shape[-1]), axis=0)


def _mean_patches(x: jax.Array, size: Any, *geometry: Any) -> jax.Array:
    """Mean of `im2col_inputs`; they are linear, so the mean over the batch is first."""
    wide = x.astype(computing_dtype(x))
    image = jnp.mean(wide.reshape(-1, *x.shape[-len(size) - 1 :]), axis=0)
    return jnp.mean(im2col_inputs(image[None], size, *geometry), axis=0)


def _linen_interceptor(probe: Probe) -> Callable[..., Any]:
    """A method interceptor that probes every nn.Dense and nn.Conv."""

    def intercept(call, args, kwargs, context):
        z, layer = call(*args, **kwargs), context.module
        if context.method_name != "__call__":
            return z
        x, name = (*args, *kwargs.values())[0], "/".join(layer.path)
        if isinstance(layer, linen.Dense):
            return probe(name, lambda: _mean_rows(x), z)
        if isinstance(layer, linen.Conv) and layer.feature_group_count == 1:
            size, dilation = layer.kernel_size, layer.kernel_dilation or 1
            size = (size,) if isinstance(size, int) else tuple(size)
            geometry = layer.strides or 1, layer.padding, dilation
            return probe(name, lambda: _mean_patches(x, size, *geometry), z)
        return z

    return intercept


def _instrument_nnx(model: nnx.Module, probe: Probe) -> None:
    """Probe the products of every nnx.Linear and nnx.Conv of a model, in place."""

    def dense(name, product, x, *args, **kwargs):
        return probe(name, lambda: _mean_rows(x), product(x, *args, **kwargs))

    def conv(name, product, x, kernel, strides, padding, **kwargs):
        dilation = kwargs.get("rhs_dilation") or 1
        geometry = kernel.shape[:-2], strides, padding, dilation
        z = product(x, kernel, strides, padding, **kwargs)
        return probe(name, lambda: _mean_patches(x, *geometry), z)

    for path, layer in nnx.iter_modules(model):
        name = "/".join(map(str, path))
        if isinstance(layer, nnx.Linear):
            layer.dot_general = functools.partial(dense, name, layer.dot_general)
        elif isinstance(layer, nnx.Conv) and layer.feature_group_count == 1:
            product = layer.conv_general_dilated
            layer.conv_general_dilated = functools.partial(conv, name, product)


def _probed(
    loss_fn: Callable[..., Any], model: Any
) -> tuple[Any, Callable[..., tuple[Any, Any]]]:
    """Parameters, and a function (params, probe, *batch) -> result, other variables."""
    if not isinstance(model, nnx.Module):

        def of_tree(params, probe, *batch):
            with linen.intercept_methods(_linen_interceptor(probe)):
                return loss_fn(params, *batch), None

        return model, of_tree
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def of_model(params, probe, *batch):
        copy = nnx.merge(graph, params, rest, copy=True)
        _instrument_nnx(copy, probe)
        return loss_fn(copy, *batch), nnx.state(copy, nnx.Not(nnx.Param))

    return params, of_model


def flax_layers(loss_fn: Callable[..., Any], model: Any, *batch: Any) -> Layers:
    """The dense layers and convolutions of a loss, as `scale_by_mkor` wants them.

    Args:
      loss_fn: ``(params, *batch) -> loss`` for linen, ``(model, *batch) -> loss`` for
        nnx. It is traced once, not run.
      model: parameters (linen: what goes in as ``{"params": params}``), or an
        `nnx.Module`.
      *batch: a batch, or `jax.ShapeDtypeStruct`s like one.

    Returns:
      Name of a layer -> (path of its kernel, path of its bias or None), for every
      Dense, Linear and Conv without feature groups. The name is the path of the layer,
      joined by "/".

    Example:
      >>> import jax, jax.numpy as jnp, optax_ext as ox
      >>> from flax import linen
      >>> model, x = linen.Sequential([linen.Dense(2)]), jnp.ones((4, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> loss_fn = lambda p, x: jnp.mean(model.apply({"params": p}, x))
      >>> ox.training.flax_layers(loss_fn, params, x)
      {'layers_0': ('layers_0/kernel', 'layers_0/bias')}
    """
    names = {}
    params, probed = _probed(loss_fn, model)

    def note(name, mean_input, z):
        del mean_input
        names[name] = None
        return z

    jax.eval_shape(lambda p, *b: probed(p, note, *b), params, *batch)
    leaves = LeavesByPath(params, "flax_layers")
    paths = {name: (_below(name, "kernel"), _below(name, "bias")) for name in names}
    return {
        name: (kernel, bias if leaves.has(bias) else None)
        for name, (kernel, bias) in paths.items()
    }


def _below(name: str, leaf: str) -> str:
    return f"{name}/{leaf}" if name else leaf


def layer_statistics(
    loss_fn: Callable[..., Any], layers: Layers, *, has_aux: bool = False
) -> Callable[..., tuple[Any, Any, dict[str, dict[str, jax.Array]]]]:
    """Loss, gradients, and the statistics of layers, in one backward pass.

    Args:
      loss_fn: ``(params, *batch)`` for linen or ``(model, *batch)`` for nnx -> a scalar
        mean over the batch, or (scalar, aux) with `has_aux`.
      layers: from `flax_layers`, or some of it.
      has_aux: whether `loss_fn` returns an auxiliary value too.

    Returns:
      A function of the same arguments that returns what `loss_fn` returns, the
      gradients (of nnx models an `nnx.State`), and a dict of extra arguments for
      ``tx.update``: ``activations``, by name of layer the mean input [fan_in] over the
      batch (of a convolution over batch and positions, in kernel order), and
      ``preact_grads``, by name the gradient in the output, summed over batch and
      positions [fan_out], which is the gradient of the bias. Both are 0 for layers that
      the loss does not use. Of an nnx model the other variables are updated in place.

    Raises:
      ValueError: when called, for a layer whose path is not in the parameters.

    Example:
      >>> import jax, jax.numpy as jnp, optax_ext as ox
      >>> from flax import linen
      >>> model, x = linen.Dense(1, use_bias=False), jnp.array([[1.0, 2.0], [3.0, 6.0]])
      >>> loss_fn = lambda p, x: jnp.mean(model.apply({"params": p}, x))
      >>> params = {"kernel": jnp.ones((2, 1))}
      >>> layers = ox.training.flax_layers(loss_fn, params, x)
      >>> loss, grads, extra = ox.training.layer_statistics(loss_fn, layers)(params, x)
      >>> print(loss, extra["activations"][""], extra["preact_grads"][""])
      6.0 [2. 4.] [1.]
    """

    def with_statistics(model, *batch):
        params, probed = _probed(loss_fn, model)
        leaves = LeavesByPath(params, "layer_statistics")
        slots = {name: _empty(leaves.get(path)) for name, (path, _) in layers.items()}

        def value(params, slots):
            def probe(name, mean_input, z):
                if name not in slots:
                    return z
                return _probe(z, mean_input(), slots[name])

            out, rest = probed(params, probe, *batch)
            loss, aux = out if has_aux else (out, None)
            return loss, (aux, rest)

        gradient = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)
        (loss, (aux, rest)), (grads, found) = gradient(params, slots)
        if isinstance(model, nnx.Module):
            nnx.update(model, rest)
        extra = {
            "activations": {
                name: sums.inputs / jnp.maximum(sums.calls, 1)
                for name, sums in found.items()
            },
            "preact_grads": {name: sums.grads for name, sums in found.items()},
        }
        return (loss, aux) if has_aux else loss, grads, extra

    return with_statistics


def _empty(kernel: jax.Array) -> _Slots:
    """Slots for the statistics of a layer with this kernel."""
    dtype = computing_dtype(kernel)
    return _Slots(*(jnp.zeros(n, dtype) for n in (*matrix_shape(kernel.shape), 1)))
