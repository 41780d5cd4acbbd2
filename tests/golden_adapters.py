"""What the meta of a golden says in prose, and a general replay cannot know.

Keyed by the names that a file calls, never by the file's own name. Most methods need
nothing here; where one does, it is an entry in one of the tables below.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

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


def scaling_law(golden: "Golden", names: Names) -> Iterator["Comparison"]:
    """The coefficients, and what they predict for larger models."""
    given, out = golden.arrays, golden.flat("out")
    a, b, c = names["fit_scaling_law"](given["in/sizes"], given["in/losses"])
    yield "coefficients", [a, b, c], out["coefficients"]
    yield "prediction", a * given["in/new_sizes"] ** b + c, out["prediction"]


def rates_by_batch(golden: "Golden", names: Names) -> Iterator["Comparison"]:
    """The three rules and the edge, at every batch size of the file."""
    found = re.findall(r"(lam1|noise_var|n_params)=([\d.]+)", golden.meta["call"])
    known = {name: float(value) for name, value in found}
    known["n_params"] = int(known["n_params"])
    sizes = golden.arrays["in/batch_sizes"].tolist()
    for name, want in golden.flat("out").items():
        if name == "edge":
            got = [names["batch_hessian_edge"](size, **known) for size in sizes]
        else:
            rule = {"rule": name, **known}
            got = [names["scale_lr_by_batch"](0.1, 128, n, **rule) for n in sizes]
        yield name, got, want


def gradient_memory(golden: "Golden", names: Names) -> Iterator["Comparison"]:
    """Projectors and ranks after each task; columns have no sign."""
    found = re.search(r"threshold=([\d.]+\d)", golden.meta["call"])
    assert found
    bases = None
    for task in range(3):
        activations = golden.flat(f"in/activations{task}")
        bases = names["update_gradient_memory"](
            bases, activations, threshold=float(found[1])
        )
        for leaf, want in golden.flat(f"out/projector{task}").items():
            yield f"projector {task} of {leaf}", bases[leaf] @ bases[leaf].T, want
            rank = np.linalg.matrix_rank(np.asarray(bases[leaf]))
            yield (
                f"rank {task} of {leaf}",
                rank,
                golden.arrays[f"out/rank{task}/{leaf}"],
            )


def guidance(golden: "Golden", names: Names) -> Iterator["Comparison"]:
    """The steps of a sampler, one after the other."""
    sampler = eval(golden.meta["call"], dict(names))
    cond, uncond = (
        jnp.asarray(golden.arrays[f"in/pred_{c}"]) for c in ("cond", "uncond")
    )
    state = sampler.init(cond[0])
    for t, want in enumerate(golden.arrays["out/pred"]):
        got, state = sampler.update(cond[t], uncond[t], state)
        yield f"step {t}", got, want


def scale_by_tree(factors: Any) -> optax.GradientTransformation:
    """Multiply each leaf by its factor, as a file's own link does."""
    return optax.stateless(
        lambda updates, _: jax.tree.map(lambda u, f: f * u, updates, factors)
    )


DEFINITIONS: dict[str, Any] = {"scale_by_tree": scale_by_tree}
"""Names that files use and that no package has."""

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
    "fit_scaling_law": scaling_law,
    "scale_lr_by_batch": rates_by_batch,
    "update_gradient_memory": gradient_memory,
    "adaptive_projected_guidance": guidance,
}
"""Whole replays, for files that none of the general ones fits."""
