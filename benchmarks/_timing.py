"""Two compiled programs timed against each other, alternating, in one process.

An update writes its results over those of the call before, as a training step does
with donated buffers. The gradient stays the same, so that nothing grows or becomes
subnormal.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Program(NamedTuple):
    """A compiled update.

    Attributes:
      call: (old updates, state, grads, params) -> (updates, state), over the first two.
      carried: old updates and state for the first call.
      grads: the gradient.
      params: the parameters.
      seconds: time to trace and compile.
    """

    call: Any
    carried: tuple[Any, Any]
    grads: Any
    params: Any
    seconds: float

    @property
    def bytes_moved(self) -> float:
        """Bytes that the program reads and writes, as XLA counts them."""
        analysis = self.call.cost_analysis()
        first = analysis[0] if isinstance(analysis, list) else analysis
        return float(first["bytes accessed"])


def compiled_update(tx: optax.GradientTransformation, params: Any) -> Program:
    """One update of `tx`, compiled."""
    update = optax.with_extra_args_support(tx).update
    grads = jax.tree.map(lambda p: 0.1 * p, params)
    carried = jax.tree.map(jnp.zeros_like, params), jax.jit(tx.init)(params)

    def step(old, state, grads, params):
        del old
        return update(grads, state, params)

    start = time.perf_counter()
    jitted = jax.jit(step, donate_argnums=(0, 1), keep_unused=True)
    call = jitted.lower(*carried, grads, params).compile()
    return Program(call, carried, grads, params, time.perf_counter() - start)


class Ratio(NamedTuple):
    """Time of one program over that of another: median of neighbours, quartiles."""

    median: float
    low: float
    high: float
    first_seconds: float
    second_seconds: float


def alternate(first: Callable, second: Callable, repeats: int) -> Ratio:
    """Call both in turn; a machine that is busy slows both."""

    def timed(call):
        start = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - start

    for call in (first, second):
        timed(call)
    seconds = []
    for k in range(repeats):
        a, b = (first, second) if k % 2 else (second, first)
        pair = timed(a), timed(b)
        seconds.append(pair if k % 2 else pair[::-1])
    low, median, high = statistics.quantiles([a / b for a, b in seconds], n=4)
    ours, theirs = (statistics.median(s) for s in zip(*seconds, strict=True))
    return Ratio(median, low, high, ours, theirs)


def repeating(program: Program) -> Callable[[], Any]:
    """A function without arguments that runs the program on its own last results."""
    carried = program.carried

    def call():
        nonlocal carried
        carried = program.call(*carried, program.grads, program.params)
        return carried

    return call
