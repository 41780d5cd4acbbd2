"""The one vocabulary of extra arguments (`update(updates, state, params, **extra)`).

A link takes only names from here, ignores the others, and forwards them to what it
wraps. Wrappers that hand their inner link another view of the parameters (stacked,
cast) translate every extra argument with the tables below.
"""

from typing import Any

TREES = (
    "grad",
    "hessian_diag",
    "aux_grads",
    "per_example_grads",
    "grad_sq_mean",
    "hvp",
    "vector",
)
"""Trees like params (`per_example_grads`: with a leading example axis)."""

MATRIX_TREES = ("bases", "inputs")
"""Trees like params with a matrix or None at each leaf."""

FUNCTIONS = ("value_fn", "obj_fn", "logits_fn", "aux_value_fn", "proxy_value_fn")
"""Functions of params that return arrays."""

TREE_FUNCTIONS = ("grad_fn",)
"""Functions of params that return a tree like params."""

VALUES = (
    "value",
    "error_mass",
    "logits_grad",
    "sampled_labels",
    "activations",
    "preact_grads",
)
"""What a view hands on as it is: scalars, labels, and trees by layer."""

NAMES = (*TREES, *MATRIX_TREES, *FUNCTIONS, *TREE_FUNCTIONS, *VALUES)
"""The whole vocabulary."""

ALIASES = {"value_fn": "obj_fn"}
"""Second names that are accepted: optax.contrib.sophia says obj_fn."""


def require(owner: str, extra: dict[str, Any], name: str) -> Any:
    """The extra argument `name`, or its alias.

    Raises:
      ValueError: naming the method, the argument, and how to pass it.
    """
    for known in (name, ALIASES.get(name)):
        if known is not None and extra.get(known) is not None:
            return extra[known]
    raise ValueError(
        f"{owner} needs the extra argument {name!r}: call "
        f"tx.update(grads, state, params, {name}=...), or let "
        "optax_ext.make_train_step pass it"
    )
