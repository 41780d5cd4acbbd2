"""Groups of parameters, named by their paths.

`optax.partition` wants a tree of labels, `optax.masked` and every ``mask=`` a tree of
booleans. Both are easier said in terms of paths, ``['encoder']['dense_0']['kernel']``.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from optax_ext._core.checks import check_interval
from optax_ext._core.trees import Bucket, is_hole, is_unit

_SHOWN = 5


def label_by_path(
    rules: Mapping[str, str] | Sequence[tuple[str, str]],
    params: Any = None,
    *,
    allow_unused: bool = False,
) -> Any:
    r"""Label each parameter by the first rule that its path matches.

    A path is what `jax.tree_util.keystr` makes of it: ``['dense']['kernel']`` in a dict
    or FrozenDict, ``['dense']['kernel'].value`` in an nnx.State, ``.dense.kernel`` in
    a dataclass, ``[0]`` in a list. A rule matches where `re.search` finds its regular
    expression, so ``bias`` and ``^\['encoder'\]`` are rules, and ``.*`` is the rule
    for the rest.

    Args:
      rules: regular expression -> label, in order of precedence: a dict, or pairs.
      params: parameters, arrays or shapes; None returns the function of params.
      allow_unused: whether a rule may match no parameter. By default that is an error,
        as it is nearly always a misspelt path.

    Returns:
      A tree like `params` with a label at each leaf, or the function that makes it:
      both are ``param_labels`` of `optax.partition`.

    Raises:
      ValueError: for an expression that does not compile, for parameters that no rule
        covers (all are counted, five are shown), and for a rule that matches none.

    Example:
      >>> import jax.numpy as jnp, optax, optax_ext as ox
      >>> params = {"embed": jnp.ones((3, 2)), "dense": {"kernel": jnp.ones((2, 2))}}
      >>> labels = ox.label_by_path({"embed": "frozen", "kernel": "train"}, params)
      >>> labels
      {'dense': {'kernel': 'train'}, 'embed': 'frozen'}
      >>> tx = optax.partition(
      ...     {"train": optax.adam(1e-3), "frozen": optax.set_to_zero()}, labels)
    """
    pairs = list(rules.items()) if isinstance(rules, Mapping) else list(rules)
    compiled = [(_compile("label_by_path", rule), label) for rule, label in pairs]

    def label(params):
        matched, uncovered = set(), []

        def of_leaf(path, leaf):
            del leaf
            where = jax.tree_util.keystr(path)
            hits = [i for i, (rule, _) in enumerate(compiled) if rule.search(where)]
            matched.update(hits)
            if not hits:
                uncovered.append(where)
                return ""
            return compiled[hits[0]][1]

        labels = jax.tree_util.tree_map_with_path(of_leaf, params)
        if uncovered:
            raise ValueError(
                f"label_by_path: no rule covers {_some(uncovered, 'parameters')}; "
                "end the rules with '.*' to label the rest"
            )
        unused = [rule for i, (rule, _) in enumerate(pairs) if i not in matched]
        if unused and not allow_unused and jax.tree.leaves(params):
            raise ValueError(
                f"label_by_path: no parameter matches {_some(unused, 'rules')}; "
                f"the paths are {_some(_paths(params), 'parameters')}. "
                "allow_unused=True lets it be"
            )
        return labels

    return label if params is None else label(params)


def decay_mask(
    params: Any = None, *, min_rank: int = 2, exclude: Sequence[str] = ()
) -> Any:
    """Which parameters decay: matrices and kernels, not biases, not norms.

    Biases and the scales of normalisations are vectors, so the rank tells them; some
    trees also hold matrices that should not decay, which `exclude` names.

    Args:
      params: parameters, arrays or shapes; None returns the function of params.
      min_rank: smallest rank that decays.
      exclude: regular expressions; a parameter whose path (as in `label_by_path`)
        matches one does not decay, whatever its rank: ``["embed", "norm", "bias"]``.

    Returns:
      A tree like `params` of Python booleans, or the function that makes it. Give
      either, or ``ox.decay_mask`` itself, as ``mask=`` of an optimizer.

    Raises:
      ValueError: for an expression that does not compile, or `min_rank` below 1.

    Example:
      >>> import jax.numpy as jnp, optax, optax_ext as ox
      >>> tx = optax.adamw(1e-3, weight_decay=0.1, mask=ox.decay_mask)
      >>> params = {"embed": jnp.ones((3, 2)), "w": jnp.ones((2, 2)), "b": jnp.ones(2)}
      >>> ox.decay_mask(params, exclude=["embed"])
      {'b': False, 'embed': False, 'w': True}
    """
    check_interval("decay_mask", min_rank=min_rank)
    if isinstance(exclude, str):
        exclude = [exclude]
    rules = [_compile("decay_mask", rule) for rule in exclude]

    def decays(path, leaf):
        if is_hole(leaf):
            return leaf
        rank = leaf.stack.ndim - 1 if isinstance(leaf, Bucket) else leaf.ndim
        where = jax.tree_util.keystr(path)
        return rank >= min_rank and not any(rule.search(where) for rule in rules)

    def mask(params):
        return jax.tree_util.tree_map_with_path(decays, params, is_leaf=is_unit)

    return mask if params is None else mask(params)


def _compile(owner: str, rule: str) -> re.Pattern[str]:
    try:
        return re.compile(rule)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"{owner}: {rule!r} is not a regular expression: {error}"
        ) from error


def _paths(params: Any) -> list[str]:
    paths = jax.tree_util.tree_leaves_with_path(params)
    return [jax.tree_util.keystr(path) for path, _ in paths]


def _some(names: Sequence[str], what: str) -> str:
    shown = ", ".join(names[:_SHOWN])
    rest = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names)} {what} ({shown}{rest})"
