"""Losses: derivatives, masks, and the order of examples.

What a loss is known by its entry of the catalogue; the tables below say what an entry
cannot. A name that is in none of them is a loss that gives one value per example, is
differentiable in all its floating-point arguments, and masks examples.
"""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_ext._core import catalogue
from tests.conformance.methods import assert_close
from tests.conformance.test_losses import array_entries, split

DETACHED: dict[str, tuple[str, ...]] = {
    "a_lol_loss": ("ref_log_probs", "rewards", "values"),
    "clipped_surrogate_loss": ("advantages",),
    "dpo_loss": ("ref_chosen_logps", "ref_rejected_logps"),
    "grpo_guard_loss": ("old_log_probs", "old_means", "advantages"),
    "grpo_loss": ("old_log_probs", "advantages"),
    "ppo_clip_loss": ("old_log_probs", "advantages"),
    "remax_loss": ("rewards", "greedy_rewards"),
    "sparse_po_loss": ("ref_chosen_log_probs", "ref_rejected_log_probs"),
    "representation_alignment_loss": ("teacher",),
    "submodular_policy_loss": ("gains",),
    "tiw_dsm_loss": ("log_ratio", "grad_log_ratio"),
    "anchor_penalty": ("anchor",),
    "curriculum_weight": ("difficulty",),
    "ensemble_distillation_loss": ("teacher_logits",),
    "kl_dro_weights": ("losses",),
    "loreun_weights": ("losses",),
    "loss_based_weights": ("losses",),
    "road_weights": ("adversary_losses",),
    "self_distillation_loss": ("teacher",),
    "shrinkmatch_loss": ("weak_probs",),
    "target_surrogate_loss": ("anchor_outputs", "output_grads"),
    "vanishing_gradient_regularizer": ("activation_grads", "error_signals"),
}
"""Arguments that carry no gradient."""

SELF_DETACHED: dict[str, str] = {
    "a_lol_loss": "the importance ratio is a weight",
    "consistency_training_loss": "the branch of the teacher",
    "f_distill_loss": "its value is its gradient's direction",
    "normalized_sigmoid_binary_cross_entropy": "the error mass is a weight",
    "normalized_softmax_cross_entropy_with_integer_labels": "the same",
    "red_diff_loss": "the denoiser's residual is a direction",
    "focal_info_nce": "the focal weight",
    "iteration_count_surrogate": "it counts, and lends a slope to the count",
    "macl_loss": "temperature and weights",
    "macl_loss_from_similarities": "the same",
    "road_loss": "the weights of the groups",
    "talr_cross_entropy": "the weights of the tokens",
}
"""Losses with weights of their own that carry no gradient."""

MIXED: dict[str, str] = {
    "noprop_loss": "its first axis is the blocks of the network",
    "ensemble_distillation_loss": "the first axis of the teachers is the models",
    "macl_loss": "the two views come one after the other",
    "orthogonal_conv_penalty": "a kernel has no examples",
}
"""Losses without an axis of examples in front, and what there is."""

NOT_ROWS: dict[str, tuple[str, ...]] = {
    "grpo_guard_loss": ("std_devs", "dts"),
    "ldam_loss": ("class_counts",),
    "vector_scaling_loss": ("class_counts",),
}
"""Arguments that have no example axis, though its length may be the same."""

TOKEN_MASKS: dict[str, str] = {
    "a_lol_loss": "log_probs",
    "grpo_loss": "log_probs",
    "remax_loss": "log_probs",
    "submodular_policy_loss": "log_probs",
    "talr_cross_entropy": "labels",
    "tldr_cross_entropy": "labels",
}
"""Losses of sequences: which argument has a value for each token."""

OTHER_MASKS: dict[str, str] = {
    "stablemax_cross_entropy_with_integer_labels": "it masks classes",
    "macl_loss_from_similarities": "it masks negatives",
    "neural_ndcg_loss": "it masks the items of a list",
}
"""Losses whose mask is over something else than examples or tokens."""

BATCH_STATISTICS: dict[str, str] = {
    "normalized_sigmoid_binary_cross_entropy": "divided by the error mass of the batch",
    "normalized_softmax_cross_entropy_with_integer_labels": "the same",
    "focal_info_nce": "the others are its negatives",
    "kl_dro_weights": "a softmax over the batch",
    "loreun_weights": "the same",
    "loss_based_weights": "the same",
    "macl_loss_from_similarities": "the temperature follows the mean similarity",
    "multi_similarity_loss": "pairs within the batch",
    "road_loss": "normalised within groups",
    "road_weights": "the same",
    "talr_cross_entropy": "its threshold is the median of the batch",
}
"""Losses in which every example depends on every other."""

ENTRIES = [entry for entry in array_entries() if entry.kind == "loss"]
EACH = pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)


def masked(tokens: bool) -> pytest.MarkDecorator:
    chosen = [
        entry
        for entry in ENTRIES
        if "where" in inspect.signature(entry.make).parameters
        and entry.name not in OTHER_MASKS
        and (entry.name in TOKEN_MASKS) is tokens
    ]
    return pytest.mark.parametrize("entry", chosen, ids=lambda e: e.name)


def total(value: Any) -> jax.Array:
    """A number that every entry of a result counts in, with another weight."""
    leaves = [jnp.ravel(x) for x in jax.tree.leaves(value)]
    flat = jnp.concatenate([x.astype(leaves[0].dtype) for x in leaves])
    return flat @ jnp.linspace(1.0, 2.0, flat.size, dtype=flat.dtype)


@EACH
def test_the_gradient_is_the_derivative(entry):
    """Along a random direction, in float64, by central differences."""
    with jax.enable_x64(True):
        arrays, rest = split(entry, jnp.float64)
        rng = np.random.default_rng(0)
        # Away from the round numbers of an example, where there may be kinks.
        arrays = {
            name: x + 1e-3 * rng.uniform(-1, 1, x.shape)
            if jnp.issubdtype(x.dtype, jnp.floating)
            else x
            for name, x in arrays.items()
        }
        floats = {k for k, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
        detached = floats & set(DETACHED.get(entry.name, ()))

        def value(moved):
            return total(entry.make(**{**arrays, **moved}, **rest))

        free = {name: arrays[name] for name in sorted(floats - detached)}
        still = {name: arrays[name] for name in sorted(detached)}
        for name, gradient in jax.grad(value)(still).items():
            assert not gradient.any(), f"{name} carries a gradient"
        if not free or entry.name in SELF_DETACHED:
            return
        along = {k: jnp.asarray(rng.normal(size=x.shape)) for k, x in free.items()}
        slope = jax.jvp(value, (free,), (along,))[1]
        h = 1e-6

        def at(step):
            return value({k: x + step * along[k] for k, x in free.items()})

        # Central differences: rounding 1e-16 / h, curvature h^2.
        difference = (at(h) - at(-h)) / (2 * h)
        scale = max(1.0, abs(float(at(0.0))))
        np.testing.assert_allclose(slope, difference, rtol=1e-6, atol=1e-7 * scale)
        for name, gradient in jax.grad(value)(free).items():
            assert jnp.isfinite(gradient).all(), name


def rows_of(entry: catalogue.Entry, arrays: dict[str, Any]) -> tuple[int, list[str]]:
    """Number of examples, and the arguments that have one row each."""
    size = arrays[entry.needs[0]].shape[0]
    apart = NOT_ROWS.get(entry.name, ())
    return size, [
        k for k, x in arrays.items() if x.ndim and len(x) == size and k not in apart
    ]


@EACH
def test_examples_may_come_in_any_order(entry):
    if entry.name in MIXED:
        assert MIXED[entry.name]
        return
    arrays, rest = split(entry)
    size, rows = rows_of(entry, arrays)
    order = np.roll(np.arange(size), 1)
    moved = {k: x[order] if k in rows else x for k, x in arrays.items()}
    got, want = entry.make(**moved, **rest), entry.make(**arrays, **rest)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        by_example = theirs.ndim and len(theirs) == size
        assert_close(ours, theirs[order] if by_example else theirs, rtol=1e-5)


@masked(tokens=False)
def test_a_masked_example_is_as_if_it_were_not_there(entry):
    arrays, rest = split(entry)
    arrays.pop("where", None)
    size, rows = rows_of(entry, arrays)
    keep = np.arange(size) != 1
    cut = {k: x[keep] if k in rows else x for k, x in arrays.items()}
    got = entry.make(**arrays, **rest, where=jnp.asarray(keep))
    want = entry.make(**cut, **rest)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if ours.ndim:
            assert not ours[~keep].any()
            ours = ours[keep]
        assert_close(ours, theirs, rtol=1e-5)


@masked(tokens=True)
def test_masked_tokens_are_as_if_the_sequence_were_shorter(entry):
    arrays, rest = split(entry)
    arrays.pop("where", None)
    size, length = arrays[TOKEN_MASKS[entry.name]].shape[:2]
    shorter = {
        k: x[:, :-1] if x.shape[:2] == (size, length) else x for k, x in arrays.items()
    }
    where = jnp.broadcast_to(jnp.arange(length) < length - 1, (size, length))
    got = entry.make(**arrays, **rest, where=where)
    want = entry.make(**shorter, **rest)
    if got.ndim == 2:
        assert not got[:, -1].any()
        got = got[:, :-1]
    assert_close(got, want, rtol=1e-5)


@EACH
def test_an_example_does_not_depend_on_its_batch_unless_the_table_says_so(entry):
    arrays, rest = split(entry)
    size, rows = rows_of(entry, arrays)
    value = entry.make(**arrays, **rest)
    single = isinstance(value, jax.Array) and value.ndim and len(value) == size
    if not single or entry.name in MIXED:
        return  # a scalar of the batch
    alone = {k: x[:1] if k in rows else x for k, x in arrays.items()}
    got = entry.make(**alone, **rest)
    if entry.name in BATCH_STATISTICS:
        assert got.shape == (1, *value.shape[1:])
    else:
        assert_close(got, value[:1], rtol=1e-5)


def test_the_tables_name_losses_that_exist():
    known = {entry.name for entry in catalogue.entries()}
    for table in (
        DETACHED,
        SELF_DETACHED,
        MIXED,
        NOT_ROWS,
        TOKEN_MASKS,
        OTHER_MASKS,
        BATCH_STATISTICS,
    ):
        assert set(table) <= known


def assert_finite_with_gradients(entry, arrays, rest):
    """In float32: values, and gradients in all arguments that are floats."""
    floats = {k for k, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}

    def value(moved):
        return total(entry.make(**{**arrays, **moved}, **rest))

    out, grads = jax.value_and_grad(value)({k: arrays[k] for k in sorted(floats)})
    assert jnp.isfinite(out)
    for name, gradient in grads.items():
        assert jnp.isfinite(gradient).all(), f"the gradient in {name}"


LOGITS = ("logits", "student_logits", "teacher_logits", "strong_logits", "aux_logits")
EMBEDDINGS = ("embeddings", "embeddings_a", "embeddings_b", "queries", "positives")


def taking(names: tuple[str, ...]) -> pytest.MarkDecorator:
    chosen = [entry for entry in ENTRIES if set(names) & set(entry.example())]
    return pytest.mark.parametrize("entry", chosen, ids=lambda e: e.name)


@taking(LOGITS)
@pytest.mark.parametrize("size", [1e4, -1e4, 0.0])
def test_logits_of_ten_thousand_are_finite(entry, size):
    """Probabilities of 0 and 1, for the right and for the wrong class, and ties."""
    arrays, rest = split(entry)
    for name in set(LOGITS) & set(arrays):
        x = arrays[name]
        signs = 1 - 2 * (jnp.arange(x.size) % 2).reshape(x.shape)
        arrays[name] = size * signs.astype(x.dtype)
    assert_finite_with_gradients(entry, arrays, rest)


@taking(EMBEDDINGS)
@pytest.mark.parametrize("size", [1.0, 0.0])
def test_identical_embeddings_are_finite(entry, size):
    arrays, rest = split(entry)
    for name in set(EMBEDDINGS) & set(arrays):
        arrays[name] = jnp.full_like(arrays[name], size)
    assert_finite_with_gradients(entry, arrays, rest)


@pytest.mark.parametrize(
    "entry",
    [
        e
        for e in ENTRIES
        if "where" in inspect.signature(e.make).parameters
        # A label has to be one of the classes.
        and e.name != "stablemax_cross_entropy_with_integer_labels"
    ],
    ids=lambda e: e.name,
)
def test_a_mask_of_nothing_is_finite(entry):
    arrays, rest = split(entry)
    arrays.pop("where", None)
    whole = {"macl_loss_from_similarities": "negatives", "neural_ndcg_loss": "scores"}
    if entry.name in whole:
        shape = arrays[whole[entry.name]].shape
    elif entry.name in TOKEN_MASKS:
        shape = arrays[TOKEN_MASKS[entry.name]].shape[:2]
    else:
        shape = arrays[entry.needs[0]].shape[:1]
    arrays["where"] = jnp.zeros(shape, bool)
    assert_finite_with_gradients(entry, arrays, rest)
