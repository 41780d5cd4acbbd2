"""Leaves as matrices: axes by name, stacks, blocks, the rest."""

# Trees of arrays, which the types of optax leave open.
# pyright: reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false
# pyright: reportArgumentType=false
# pyright: reportOperatorIssue=false
# pyright: reportCallIssue=false

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax.contrib import MuonDimensionNumbers

import optax_ext as ox
from optax_ext._core.matrices import as_matrix, matrix_shape


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def polar(_):
    """A rule that couples all entries of a matrix: its orthogonal polar factor."""

    def init(p):
        del p
        return ()

    def update(g, slots, p, t):
        del p, t
        u, _, v = jnp.linalg.svd(g, full_matrices=False)
        return u @ v, slots

    return ox.leafwise(optax.EmptyState, init, update)


POLAR = polar(None)


def exact_polar(x):
    u, _, v = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    return u @ v


def first_update(tx, grads):
    return jax.jit(lambda g: tx.update(g, tx.init(g), g)[0])(grads)


def test_a_convolution_is_kh_kw_in_by_out():
    assert matrix_shape((3, 3, 2, 4)) == (18, 4)
    x = normal(3, 3, 2, 4)
    assert (as_matrix(x)[(1 * 3 + 2) * 2 + 1] == x[1, 2, 1]).all()


def test_attention_of_linen_and_nnx_folds_heads_where_they_are_outputs():
    linen = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6)
    shapes = jax.eval_shape(linen.init, jax.random.key(0), jnp.ones((1, 3, 6)))
    axes = ox.matrix_axes(shapes["params"])
    into = MuonDimensionNumbers((0,), (1, 2))
    assert [axes[k]["kernel"] for k in ("query", "key", "value")] == [into] * 3
    assert axes["out"]["kernel"] == MuonDimensionNumbers((0, 1), (2,))
    assert {axes[k]["bias"] for k in axes} == {None}

    module = nnx.MultiHeadAttention(2, 6, decode=False, rngs=nnx.Rngs(0))
    state = nnx.state(module, nnx.Param)
    axes = ox.matrix_axes(nnx.to_pure_dict(state))
    assert axes["query"]["kernel"] == into
    assert axes["out"]["kernel"] == MuonDimensionNumbers((0, 1), (2,))


def test_embeddings_vectors_and_holes_are_no_matrices():
    params = {"embed": jnp.ones((5, 2)), "scale": jnp.ones(3), "w": jnp.ones((2, 3))}
    axes = ox.matrix_axes({**params, "gone": optax.MaskedNode()})
    assert axes == {
        "embed": None,
        "scale": None,
        "gone": None,
        "w": MuonDimensionNumbers((0,), (1,)),
    }
    assert ox.matrix_axes(exclude=())(params)["embed"] is not None


def test_layers_of_a_scan_are_one_matrix_each():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(4)(x), None

    stack = nn.scan(
        Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    )
    params = stack(name="layers").init(jax.random.key(0), jnp.ones((2, 4)), None)
    grads = jax.tree.map(lambda p: normal(*p.shape), params)
    axes = ox.matrix_axes(scanned=["layers|Dense"])
    tx = ox.as_matrices(POLAR, optax.identity(), axes)
    kernel = jax.tree.leaves(first_update(tx, grads))
    given = jax.tree.leaves(grads)
    which = [i for i, g in enumerate(given) if g.ndim == 3]
    assert len(which) == 1
    want = np.stack([exact_polar(g) for g in given[which[0]]])
    np.testing.assert_allclose(kernel[which[0]], want, atol=1e-5)
    bias = 1 - which[0]
    np.testing.assert_array_equal(kernel[bias], given[bias])


@pytest.mark.parametrize("inner", [POLAR, ox.bucketed(POLAR)], ids=["bare", "bucketed"])
def test_every_fold_is_the_rule_on_the_matrix_that_it_says(inner):
    grads = {
        "query": {"kernel": normal(4, 2, 3)},
        "conv": normal(2, 2, 3, 5, seed=1),
        "dense": normal(4, 6, seed=2),
        "bias": normal(3, seed=3),
    }
    got = first_update(ox.as_matrices(inner, optax.scale(2.0)), grads)
    for out, given, shape in (
        (got["query"]["kernel"], grads["query"]["kernel"], (4, 6)),
        (got["conv"], grads["conv"], (12, 5)),
        (got["dense"], grads["dense"], (4, 6)),
    ):
        want = exact_polar(given.reshape(shape)).reshape(given.shape)
        # Some tens of roundings of float32 for a condition number of about 10.
        np.testing.assert_allclose(out, want, atol=2e-5)
    np.testing.assert_array_equal(got["bias"], 2 * grads["bias"])


def test_blocks_are_matrices_of_their_own():
    grads = {"w": normal(5, 7)}
    got = first_update(ox.as_matrices(POLAR, block_size=4), grads)["w"]
    # 5 rows in two blocks of 3 and 2 (a row of zeros at the end), 7 columns in 4 and 3.
    for rows in (slice(0, 3), slice(3, 5)):
        for columns in (slice(0, 4), slice(4, 7)):
            want = exact_polar(grads["w"][rows, columns])
            np.testing.assert_allclose(got[rows, columns], want, atol=2e-5)


def test_axes_in_neither_list_are_batch_axes_wherever_they_stand():
    grads = {"w": normal(3, 2, 4)}
    axes = {"w": MuonDimensionNumbers(0, 2)}
    got = first_update(ox.as_matrices(POLAR, dimension_numbers=axes), grads)["w"]
    for k in range(2):
        want = exact_polar(grads["w"][:, k])
        np.testing.assert_allclose(got[:, k], want, atol=2e-5)


def test_inner_and_fallback_see_their_own_leaves_and_all_extra_arguments():
    seen = {}

    def spy(name):
        def update(updates, state, params=None, **extra):
            seen[name] = extra["value"], jnp.shape(extra["grad"]["w"])
            return updates, state

        return optax.GradientTransformationExtraArgs(lambda p: (), update)

    grads = {"w": normal(2, 2, 3), "b": normal(3)}
    tx = ox.as_matrices(spy("matrix"), spy("rest"))
    tx.update(grads, tx.init(grads), grads, value=1.0, grad=grads)
    assert seen == {"matrix": (1.0, (4, 3)), "rest": (1.0, (2, 2, 3))}


def test_functions_of_params_see_the_parameters_in_their_own_shapes():
    estimator = ox.hutchinson_diag()
    tx = ox.as_matrices(ox.scale_by_adahessian(estimator=estimator), optax.identity())
    params = {"w": normal(2, 2, 3), "b": normal(3)}

    def value_fn(p):
        assert p["w"].shape == (2, 2, 3)
        return jnp.sum(p["w"] ** 4)

    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(grads, tx.init(params), params, value_fn=value_fn)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)


def test_gradients_of_examples_keep_their_axis():
    grads = {"w": normal(2, 2, 3)}
    each = {"w": normal(7, 2, 2, 3)}

    def update(updates, state, params=None, *, per_example_grads):
        del params
        g = per_example_grads["w"]
        assert g.shape == (7, 4, 3)
        return {"w": jnp.mean(g, 0)}, state

    inner = optax.GradientTransformationExtraArgs(lambda p: (), update)
    tx = ox.as_matrices(inner, optax.identity())
    got, _ = tx.update(grads, tx.init(grads), grads, per_example_grads=each)
    np.testing.assert_allclose(got["w"], jnp.mean(each["w"], 0), rtol=1e-6)


def test_the_default_fallback_is_adam_in_float32():
    grads = {"b": normal(3).astype(jnp.bfloat16)}
    tx = ox.as_matrices(POLAR)
    state = tx.init(grads)
    got = tx.update(grads, state, grads)[0]["b"]
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, jnp.sign(grads["b"]))
    assert optax.tree.get(state, "nu")["b"].dtype == jnp.float32


def test_bad_arguments_are_named():
    params = {"w": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match="block_size"):
        ox.as_matrices(POLAR, block_size=0)
    with pytest.raises(ValueError, match=r"heads=.* holds no regular expressions"):
        ox.matrix_axes(heads=["("])
    wrong = {"w": MuonDimensionNumbers(0, 2)}
    with pytest.raises(ValueError, match=r"are no axes of an array of \(2, 3\)"):
        ox.as_matrices(POLAR, dimension_numbers=wrong).init(params)
    twice = {"w": MuonDimensionNumbers(0, -2)}
    with pytest.raises(ValueError, match="are no axes"):
        ox.as_matrices(POLAR, dimension_numbers=twice).init(params)
    with pytest.raises(ValueError, match="dimension_numbers has 2 leaves"):
        ox.as_matrices(POLAR, dimension_numbers={"a": None, "w": None}).init(params)
    with pytest.raises(ValueError, match=r"as_matrices\(bucketed\(inner\)\)"):
        ox.bucketed(ox.as_matrices(POLAR, dimension_numbers=lambda p: wrong)).init(
            params
        )
    tx = ox.as_matrices(ox.scale_by_adahessian(estimator=ox.external_hessian_diag()))
    with pytest.raises(ValueError, match=r"extra argument has shape \(3, 2\)"):
        tx.update(params, tx.init(params), params, hessian_diag={"w": jnp.ones((3, 2))})
