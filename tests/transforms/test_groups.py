"""`label_by_path` and `decay_mask`: groups of parameters by path."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict

import optax_ext as ox


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: Any
    bias: Any


class Pair(NamedTuple):
    kernel: Any
    bias: Any


KERNEL, BIAS = jnp.ones((2, 3)), jnp.ones((3,))
TREES = {
    "dict": {"dense": {"kernel": KERNEL, "bias": BIAS}},
    "FrozenDict": FrozenDict({"dense": {"kernel": KERNEL, "bias": BIAS}}),
    "dataclass": {"dense": Layer(KERNEL, BIAS)},
    "NamedTuple": [Pair(KERNEL, BIAS)],
    "nnx.State": nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param),
    "None leaf": {"kernel": KERNEL, "bias": BIAS, "none": None},
}
RULES = {"bias": "frozen", ".*": "train"}
EACH = pytest.mark.parametrize("params", TREES.values(), ids=TREES)


@EACH
@pytest.mark.parametrize("late", [False, True])
def test_optax_partition_takes_the_labels_of_every_tree(params, late):
    labels = ox.label_by_path(RULES, None if late else params)
    transforms = {
        "train": ox.full_precision(optax.adam(0.1)),
        "frozen": optax.set_to_zero(),
    }
    tx = optax.partition(transforms, labels)
    state = jax.jit(tx.init)(params)
    updates, after = jax.jit(tx.update)(params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
        assert leaf.any() != ("bias" in jax.tree_util.keystr(path))
    # Frozen groups hold no state: two moments of the kernel, and the count.
    assert sorted(x.shape for x in jax.tree.leaves(state)) == [(), (2, 3), (2, 3)]


@EACH
def test_labels_have_the_structure_of_the_parameters(params):
    labels = ox.label_by_path(RULES, params)
    assert jax.tree.structure(labels) == jax.tree.structure(params)
    assert sorted(jax.tree.leaves(labels)) == ["frozen", "train"]


def test_the_first_rule_that_matches_wins():
    params = {"a": {"w": 1.0, "b": 1.0}, "c": {"w": 1.0}}
    pairs = [(r"\['a'\]\['w'\]", "one"), ("'w'", "two"), ("^.'a'", "three")]
    want = {"a": {"w": "one", "b": "three"}, "c": {"w": "two"}}
    assert ox.label_by_path(pairs, params) == want
    assert ox.label_by_path(dict(pairs), params) == want
    # A rule that others hide is not unused: it matches.
    assert ox.label_by_path([("a", "x"), *pairs], params)["a"]["w"] == "x"


def test_paths_are_those_of_keystr():
    seen = {
        jax.tree_util.keystr(path)
        for tree in TREES.values()
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    }
    for path in ("['dense']['kernel']", "['dense'].bias", "[0].bias", "['bias'].value"):
        assert path in seen


def test_shapes_will_do():
    params = jax.eval_shape(lambda: TREES["dict"])
    assert jax.tree.leaves(ox.label_by_path(RULES, params)) == ["frozen", "train"]


def test_an_error_names_what_no_rule_covers():
    params = {"embed": KERNEL, "head": {"w": KERNEL, "b": BIAS}}
    message = r"no rule covers 2 parameters \(\['head'\]\['b'\], \['head'\]\['w'\]\)"
    with pytest.raises(ValueError, match=message):
        ox.label_by_path({"embed": "a"}, params)
    many = {f"layer{i}": BIAS for i in range(9)} | {"embed": KERNEL}
    with pytest.raises(ValueError, match=r"9 parameters \(.*layer4'\], \.\.\.\)"):
        ox.label_by_path({"embed": "a"}, many)


def test_an_error_names_rules_that_match_nothing():
    params = TREES["dict"]
    with pytest.raises(ValueError, match=r"1 rules \(biass\); the paths are 2"):
        ox.label_by_path({"biass": "a", ".*": "b"}, params)
    labels = ox.label_by_path({"biass": "a", ".*": "b"}, params, allow_unused=True)
    assert set(jax.tree.leaves(labels)) == {"b"}
    assert ox.label_by_path(RULES, {}) == {}


def test_a_rule_must_be_a_regular_expression():
    with pytest.raises(ValueError, match=r"label_by_path: '\[' is not a regular"):
        ox.label_by_path({"[": "a"})
    with pytest.raises(ValueError, match=r"decay_mask: '\*' is not a regular"):
        ox.decay_mask(exclude=["*"])


@EACH
def test_biases_and_norms_do_not_decay(params):
    """As a tree, as a function, and as the function that makes one."""
    mask = ox.decay_mask(params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    for given in (mask, ox.decay_mask, ox.decay_mask()):
        tx = optax.add_decayed_weights(0.1, given)
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, _ = tx.update(zeros, tx.init(params), params)
        for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
            assert leaf.any() == ("kernel" in jax.tree_util.keystr(path))


def test_names_can_be_excluded_whatever_their_rank():
    params = {"embed": KERNEL, "norm": {"scale": KERNEL}, "w": KERNEL, "b": BIAS}
    mask = ox.decay_mask(params, exclude=["embed", "norm"])
    assert mask == {"embed": False, "norm": {"scale": False}, "w": True, "b": False}
    assert ox.decay_mask(params, exclude="embed")["norm"]["scale"]
    every = ox.decay_mask(params, min_rank=1, exclude=["'b'"])
    assert every == {"embed": True, "norm": {"scale": True}, "w": True, "b": False}
    with pytest.raises(ValueError, match="decay_mask: min_rank"):
        ox.decay_mask(min_rank=0)


def test_every_optimizer_takes_the_mask():
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    for make in (ox.adamw_cwd, ox.lion_k, ox.full_precision):
        if make is ox.full_precision:
            tx = make(optax.adamw(0.1, weight_decay=0.1, mask=ox.decay_mask))
        else:
            tx = make(0.1, weight_decay=0.1, mask=ox.decay_mask)
        updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
        assert not updates["b"].any()
        np.testing.assert_allclose(updates["w"], -0.01, rtol=1e-5)


def test_a_stack_has_the_rank_of_its_leaves():
    params = {"w": KERNEL, "v": KERNEL, "b": BIAS, "c": BIAS}
    tx = ox.bucketed(optax.add_decayed_weights(0.1, ox.decay_mask))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    moved = {key: bool(x.any()) for key, x in updates.items()}
    assert moved == {"w": True, "v": True, "b": False, "c": False}
