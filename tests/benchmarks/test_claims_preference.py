"""The preference_length claim in its short form, from the command line."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.claims import preference_length as claim

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """What the short run printed, its results, and its folder."""
    output = tmp_path_factory.mktemp("claims")
    module = "benchmarks.claims.preference_length"
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", module, "--short", f"--output={output}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((output / "preference_length.json").read_text())
    return done.stdout, result, output


def test_results_say_where_and_how_they_were_measured(short):
    _, result, output = short
    assert "benchmarks.claims.preference_length --short" in result["command"]
    assert result["versions"]["jax"] and result["device"]["platform"]
    assert result["settings"]["seeds"] == 2 and result["seeds"] == [0, 1]
    assert result["hyperparameters"]["simpo"] == {"beta": 2.0, "gamma": 0.5}
    image = (output / "preference_length.png").read_bytes()
    assert image.startswith(b"\x89PNG")


def test_every_method_has_its_curves_at_every_bias_from_one_reference(short):
    _, result, _ = short
    shape = (len(result["biases"]), 2, len(result["steps"]))
    assert set(result["curves"]) == {"dpo", "simpo", "simpo_sum"}
    for curve in result["curves"].values():
        length, quality = np.array(curve["length"]), np.array(curve["quality"])
        assert length.shape == quality.shape == shape
        assert np.all((length >= 1) & (length <= claim.LONGEST))
        assert np.all(abs(quality) <= 1)
        start = np.array(result["curves"]["dpo"]["length"])[..., 0]
        np.testing.assert_allclose(length[..., 0], start, rtol=1e-5)


def test_a_bias_makes_what_is_chosen_longer(short):
    # Of the same answers, a stronger bias chooses the longer one at least as often.
    _, result, _ = short
    pairs = {name: np.array(x) for name, x in result["pairs"].items()}
    longer = pairs["chosen_length"] - pairs["rejected_length"]
    assert np.all(np.diff(longer, axis=0) > 0)
    assert np.all(pairs["chosen_quality"] > pairs["rejected_quality"])


def test_the_verdict_at_each_bias_follows_from_the_seeds_and_is_printed(short):
    printed, result, _ = short
    lengths = {m: np.array(c["length"]) for m, c in result["curves"].items()}
    words = {0: "shown", 2: "refuted"}
    for at, line in enumerate(result["claims"]):
        for method in claim.METHODS:
            growth = lengths[method][at, :, -1] / lengths[method][at, :, 0] - 1
            np.testing.assert_allclose(line[method]["growth"], growth, rtol=1e-9)
            assert line[method]["seeds_grown"] == (growth > 0).sum()
        assert line["claim"] == words.get(line["simpo"]["seeds_grown"], "mixed")
        verdict = f"Bias {line['bias']:g}: 'SimPO does not grow length' is "
        assert verdict + line["claim"].upper() in printed


def test_exact_mean_length_and_quality_are_those_of_samples():
    policy = claim.make_world(jax.random.key(0)).at[:, claim.END].add(0.5)
    length, quality = claim.expected(policy)
    tokens, where = claim.sample(policy, jax.random.key(1), 20000)
    lengths, qualities = claim.measure(tokens, where)
    error = float(lengths.std()) / 20000**0.5
    assert abs(float(lengths.mean() - length)) < 5 * error
    drawn = float((lengths * qualities).sum() / lengths.sum())
    # A quality in [-1, 1] of at least 20000 tokens that depend on one another weakly.
    assert abs(drawn - float(quality)) < 0.05


def test_the_reference_is_fitted_to_the_world():
    world = claim.make_world(jax.random.key(2))
    fitted = claim.fit(*claim.sample(world, jax.random.key(3), 4096))
    for mine, yours in zip(claim.expected(fitted), claim.expected(world), strict=True):
        np.testing.assert_allclose(mine, yours, rtol=0.1, atol=0.05)


def test_length_at_a_quality_is_interpolated_and_nan_if_it_is_never_reached():
    curve = {"length": np.array([10.0, 12.0, 20.0]), "quality": np.array([0, 0.2, 0.4])}
    assert claim.length_at(0.1, curve) == pytest.approx(11)
    assert claim.length_at(0.0, curve) == 10
    assert np.isnan(claim.length_at(0.5, curve))


def test_an_answer_has_one_token_at_least():
    policy = jnp.zeros((claim.VOCABULARY + 1,) * 2).at[:, claim.END].set(50.0)
    tokens, where = claim.sample(policy, jax.random.key(4), 64)
    assert np.all(claim.measure(tokens, where)[0] == 1)
    assert claim.expected(policy)[0] == pytest.approx(1, rel=1e-5)
