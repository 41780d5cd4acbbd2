"""The worked example of CONTRIBUTING.md is true."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_ext._core import catalogue

_ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.setattr(catalogue, "_entries", dict(catalogue._entries))
    text = (_ROOT / "CONTRIBUTING.md").read_text()
    match = re.search(r"<!-- worked-example -->\n```python\n(.*?)```", text, re.DOTALL)
    assert match, "CONTRIBUTING.md has no worked example between its markers"
    names = {"__name__": "worked_example"}
    exec(compile(match[1], "CONTRIBUTING.md", "exec"), names)
    return names


def test_the_worked_example_is_the_method_it_names(example):
    params = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.float32(2)}
    ours, optax_yogi = example["scale_by_my_yogi"](), optax.scale_by_yogi()
    states = ours.init(params), optax_yogi.init(params)
    for t in range(5):
        grads = jax.tree.map(lambda p, t=t: jnp.cos(p + t), params)
        u, s0 = ours.update(grads, states[0], params)
        v, s1 = optax_yogi.update(grads, states[1], params)
        states = s0, s1
        # One rounding of each operation of the rule, in another order.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-6), u, v)


def test_the_worked_example_keeps_float32_moments_for_bfloat16(example):
    tx = example["scale_by_my_yogi"]()
    params = jnp.ones((3,), jnp.bfloat16)
    updates, state = tx.update(params, tx.init(params))
    assert updates.dtype == jnp.bfloat16
    assert state.nu.dtype == jnp.float32


def test_the_worked_example_enters_the_catalogue(example):
    entry = catalogue.find("scale_by_my_yogi")
    assert entry.slots == 2
    assert "*Compared with*: optax.scale_by_yogi" in (entry.make.__doc__ or "")
