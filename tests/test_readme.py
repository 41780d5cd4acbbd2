"""What the README says is so."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_ext as ox
from benchmarks import readme

_ROOT = pathlib.Path(__file__).parents[1]
_TEXT = (_ROOT / "README.md").read_text()


def test_the_tables_are_those_of_the_catalogue_and_the_results():
    assert readme.render(_TEXT) == _TEXT, "run python -m benchmarks.readme"


def test_the_flagship_chain_trains():
    code = re.search(r"```python\n(.*?)```", _TEXT, re.DOTALL)
    assert code
    assert len(code[1].strip().splitlines()) <= 12
    x, y = jax.random.normal(jax.random.key(0), (64, 5)), jnp.arange(64) % 3

    def logits_fn(params, x):
        return x @ params["kernel"] + params["bias"]

    def loss_fn(params, x, y):
        logits = logits_fn(params, x)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def batch_logits(params, x, y):
        del y
        return logits_fn(params, x)

    names = {"loss_fn": loss_fn, "logits_fn": batch_logits}
    exec(compile(code[1], "README.md", "exec"), names)
    tx, step = names["tx"], names["step"]
    params = {"kernel": jnp.zeros((5, 3)), "bias": jnp.zeros(3)}
    state, losses = tx.init(params), []
    for _ in range(100):
        params, state, metrics = step(params, state, x, y)
        losses.append(float(metrics.loss))
    # The model can only fit the noise of the inputs, so the loss falls a little.
    assert losses[-1] < losses[0] - 0.01


def test_numerators_and_denominators_of_micro_batches_add_up():
    code = re.findall(r"```python\n(.*?)```", _TEXT, re.DOTALL)[1]
    random = np.random.default_rng(0)
    batch = {
        "log_probs": -random.uniform(0.1, 2, (6, 5)),
        "old_log_probs": -random.uniform(0.1, 2, (6, 5)),
        "rewards": random.normal(size=6),
        "mask": np.arange(5) < random.integers(1, 5, (6, 1)),
    }
    advantages = ox.losses.group_relative_advantages(jnp.asarray(batch["rewards"]))

    def parts(rows):
        names = {"ox": ox, **{k: jnp.asarray(x[rows]) for k, x in batch.items()}}
        exec(compile(code, "README.md", "exec"), names)
        return names["loss"].sum(), names["tokens"].sum()

    loss, tokens = parts(slice(None))
    want = ox.losses.grpo_loss(
        jnp.asarray(batch["log_probs"]),
        jnp.asarray(batch["old_log_probs"]),
        advantages,
        where=jnp.asarray(batch["mask"]),
        aggregate="token",
    ).mean()
    np.testing.assert_allclose(loss / tokens, want, rtol=1e-6)


def test_the_pieces_that_go_with_any_optimizer_go_together():
    code = re.findall(r"```python\n(.*?)```", _TEXT, re.DOTALL)[2]
    x = jax.random.normal(jax.random.key(0), (64, 5))

    def loss_fn(params, x):
        out = jnp.tanh(x @ params["embed"]) @ params["head"] + params["bias"]
        return jnp.mean((out - x.sum(axis=1, keepdims=True)) ** 2)

    names = {"loss_fn": loss_fn, "ox": ox, "optax": optax}
    exec(compile(code, "README.md", "exec"), names)
    tx, step = names["tx"], names["step"]
    key = jax.random.key(1)
    params = {
        "embed": jax.random.normal(key, (5, 8)),
        "head": jnp.zeros((8, 1)),
        "bias": jnp.zeros(1),
    }
    embed, state, losses = jnp.copy(params["embed"]), tx.init(params), []
    for _ in range(100):
        params, state, metrics = step(params, state, x)
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0] * 0.99
    assert (params["embed"] == embed).all()
    assert float(ox.recorded(state)["grad_norm"]) > 0


def test_each_command_is_one_line_that_installs_what_it_needs():
    for name, extras in (("quickstart", "bench"), ("test", "bench,test")):
        pattern = rf"<!-- {name}-command -->\n```bash\n(.*)\n```\n<!-- /{name}-command"
        command = re.search(pattern, _TEXT)
        assert command, name
        assert f'".[{extras}]"' in command[1]
        assert "venv .venv" in command[1]


def test_every_public_name_is_documented():
    undocumented = [
        name
        for holder in (ox, ox.losses)
        for name in holder.__all__
        if not (getattr(holder, name).__doc__ or "").strip()
    ]
    assert not undocumented
