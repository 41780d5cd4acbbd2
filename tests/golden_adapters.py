"""What the meta of a golden says in prose, and a general replay cannot know.

Keyed by the names that a file calls, never by the file's own name. Most methods need
nothing here; where one does, it is an entry in one of the four tables.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from tests.test_goldens import Comparison, Golden

Names = Mapping[str, Any]


def at_predicted_weights(names: Names, state: Any, params: Any, notes: str) -> Any:
    """The point of XGrad's gradient; its scale stands in the notes."""
    found = re.search(r"scale=(-?[\d.]*\d)", notes)
    scale = float(found[1]) if found else 1.0
    return names["xgrad_predict"](state, params, scale=scale)


def gauss_newton_bartlett(golden: "Golden", names: Names) -> Iterator["Comparison"]:
    """The estimate for the given labels, and its mean over all labels."""
    x = {name: jnp.asarray(value) for name, value in golden.tree("in").items()}
    params = {"kernel": x["kernel"], "bias": x["bias"]}
    estimator = names["gauss_newton_bartlett_diag"]()

    def logits(params, features):
        return features @ params["kernel"] + params["bias"]

    def estimate(features, labels):
        return estimator.update(
            None,
            estimator.init(params),
            params,
            logits_fn=lambda p: logits(p, features),
            sampled_labels=labels,
        )[0]

    def expected_of_row(features):
        chances = jax.nn.softmax(logits(params, features[None])[0])
        labels = jnp.arange(chances.size)
        alone = jax.vmap(lambda label: estimate(features[None], label[None]))(labels)
        return jax.tree.map(lambda h: jnp.tensordot(chances, h, 1), alone)

    given = jax.jit(estimate)(x["X"], x["labels"])
    # Gradients of different rows are independent with mean 0, so that the expectation
    # of B times the square of their mean is the mean of each row's own expectation.
    expected = jax.jit(jax.vmap(expected_of_row))(x["X"])
    for name in params:
        yield f"estimate/{name}", given[name], golden.arrays[f"out/hessian_diag/{name}"]
        want = golden.arrays[f"out/expected_diag/{name}"]
        yield f"expectation/{name}", jnp.mean(expected[name], axis=0), want


INITIAL_STATE: dict[str, dict[str, str]] = {
    "gravity": {"velocity": "v0"},
    "scale_by_psgd_lra": {"U": "U0", "V": "V0"},
}
"""Initial states that were random: field of the state -> what of x/ replaces it."""

FUNCTIONS: dict[str, tuple[str, float]] = {
    "value_fn": ("", 1.0),
    "proxy_value_fn": ("h", 1.0),
    "aux_value_fn": ("2", -1.0),
}
"""Functions of params: extra argument -> suffix of its x/A, x/b, x/c, and its sign."""

GRADIENT_POINT: dict[str, Callable[[Names, Any, Any, str], Any]] = {
    "xgrad": at_predicted_weights,
}
"""Where the gradient is taken, if not at the parameters."""

REPLAY: dict[str, Callable[["Golden", Names], Iterator["Comparison"]]] = {
    "gauss_newton_bartlett_diag": gauss_newton_bartlett,
}
"""Whole replays, for files that none of the general ones fits."""
