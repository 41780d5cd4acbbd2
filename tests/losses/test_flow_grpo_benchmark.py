"""The flow_grpo benchmark in its short form, from the command line."""

import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import _flow_policy as fp
from benchmarks import flow_grpo

ROOT = pathlib.Path(__file__).parents[2]
# A log-probability of order 1 is rounded to 1.2e-7, and a log-ratio is a difference of
# two: a floor under the Monte-Carlo error, which falls to 1e-8 at the first steps.
ROUNDING = 3e-7


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """What the short run printed, its results, and its folder."""
    output = tmp_path_factory.mktemp("flow_grpo")
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.flow_grpo", "--short", f"--output={output}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((output / "flow_grpo.json").read_text()), output


def law(result, name):
    return {k: np.array(v) for k, v in result["law"][name].items()}


def test_raw_mean_ratio_follows_its_law_within_the_monte_carlo_error(short):
    raw = law(short[1], "raw")
    assert raw["gap"].shape == (2, fp.STEPS)
    np.testing.assert_array_less(abs(raw["gap"]), 5 * raw["gap_error"] + ROUNDING)
    # The law is not the trivial one: at the last step it is many errors below 1.
    assert np.all(raw["law"][:, -1] < 1 - 20 * raw["gap_error"][:, -1])


def test_normalised_mean_ratio_follows_its_closed_form_within_the_error(short):
    normalized = law(short[1], "normalized")
    off = abs(normalized["mean"] - normalized["law"])
    np.testing.assert_array_less(off, 5 * normalized["mean_error"] + ROUNDING)


def test_normalised_mean_ratio_is_one_within_the_bar(short):
    _, result, _ = short
    normalized, bar = law(result, "normalized"), result["bars"]["normalized"]["bar"]
    np.testing.assert_array_less(
        abs(normalized["mean"] - 1), bar + 5 * normalized["mean_error"]
    )
    assert result["bars"]["normalized"]["seeds_met"] == 2


def test_normalised_log_ratios_vary_less_over_the_steps(short):
    raw, normalized = (
        law(short[1], name)["variance"] for name in ("raw", "normalized")
    )
    assert np.all(normalized.max(1) / normalized.min(1) < raw.max(1) / raw.min(1))


def test_every_step_and_both_methods_are_printed(short):
    printed, result, _ = short
    part_a, part_b = printed.split("B. Importance ratio")
    for k in range(fp.STEPS):
        mean = np.mean(result["law"]["raw"]["mean"], 0)[k]
        assert f" {k + 1} " in part_a and f"{mean:.5f}" in part_a
        clipped = np.mean(result["training"]["grpo_guard"]["clipped"], 0)[k]
        assert f"{clipped:.3f}" in part_b
    assert "Flow-GRPO: the proxy goes from" in part_b
    assert "GRPO-Guard: the proxy goes from" in part_b


def test_results_say_where_and_how_they_were_measured(short):
    _, result, output = short
    assert result["command"].startswith("python -m benchmarks.flow_grpo --short")
    assert result["versions"]["jax"] and result["device"]["platform"]
    assert result["seeds"] == [0, 1] and len(result["seed_seconds"]) == 2
    assert result["settings"]["iterations"] == 3
    for values in result["training"].values():
        assert np.shape(values["proxy"]) == np.shape(values["distance"]) == (2, 4)
        assert np.all(
            np.isfinite(np.concatenate([values["proxy"], values["distance"]]))
        )
    assert (output / "flow_grpo.png").read_bytes().startswith(b"\x89PNG")


def test_a_missed_bar_is_said():
    near = {"mean": np.ones((2, 3)), "mean_error": np.full((2, 3), 1e-5)}
    raw = {"gap": np.zeros((2, 3)), "gap_error": np.full((2, 3), 1e-4)}
    exact = {"law": np.ones((2, 3))}
    near["mean"][1, 2] += 1.5e-3
    checked = flow_grpo.check_bars(
        {"raw": {**raw, **exact}, "normalized": {**near, **exact}}, pairs=1000
    )
    bar = checked["normalized"]
    assert bar["seeds_met"] == 1 and bar["mean_over_seeds_met"]
    assert (bar["worst_seed"], bar["worst_step"]) == (1, 3)
    assert bar["worst"] == pytest.approx(1.5e-3)
    # The error falls with the root of the pairs, and 1e-4 is half of a tenth of 2e-3.
    assert checked["raw"]["pairs_needed"] == pytest.approx(250, abs=1)


def test_gold_metrics_are_those_of_the_data():
    x = jnp.array([[2.0, 0.25], [0.0, 0.0]])
    np.testing.assert_allclose(fp.distance_to_data(x), [0.25, 2.0], rtol=1e-6)
    density = np.mean(
        [
            np.exp(-((x - c[None]) ** 2).sum(-1) / (2 * fp.SPREAD**2))
            / (2 * np.pi * fp.SPREAD**2)
            for c in fp.CENTRES
        ],
        0,
    )
    np.testing.assert_allclose(fp.data_log_likelihood(x), np.log(density), rtol=1e-5)
    np.testing.assert_allclose(
        fp.proxy_reward(jnp.asarray(fp.TARGET[None] + 1)), -np.sqrt(2)
    )
