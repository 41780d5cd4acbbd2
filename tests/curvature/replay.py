"""The function-based golden files, for what they record beside parameters."""

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

FOLDER = pathlib.Path(__file__).parents[1] / "goldens" / "curvature"


class Quartic:
    """p'Ap/2 - b'p + c sum(p^4)/4 of a golden file, and the file's arrays."""

    def __init__(self, name: str):
        with np.load(FOLDER / f"{name}.npz") as file:
            self.arrays = {key: file[key] for key in file.files if key != "meta"}
        self.start = {
            key[3:]: jnp.asarray(x)
            for key, x in self.arrays.items()
            if key.startswith("p0/")
        }
        self.a, self.b, self.c = (jnp.asarray(self.arrays[f"x/{k}"]) for k in "Abc")

    def __call__(self, params: Any) -> jax.Array:
        p, _ = ravel_pytree(params)
        return p @ self.a @ p / 2 - self.b @ p + self.c * jnp.sum(p**4) / 4

    def states(
        self,
        tx: optax.GradientTransformationExtraArgs,
        steps: int,
        extra: Callable[[Any, int], dict[str, Any]] = lambda params, t: {},
    ) -> Iterator[Any]:
        """The states after each step."""

        @jax.jit
        def step(params, state, extra):
            value, grads = jax.value_and_grad(self)(params)
            updates, state = tx.update(
                grads, state, params, value=value, value_fn=self, **extra
            )
            return optax.apply_updates(params, updates), state

        params, state = self.start, tx.init(self.start)
        for t in range(steps):
            params, state = step(params, state, extra(params, t))
            yield state
