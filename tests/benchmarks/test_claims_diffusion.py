"""The claims about diffusion weightings in their short form, from the command line."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.claims import _digits_diffusion as dd
from benchmarks.claims import diffusion_weightings

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    output = tmp_path_factory.mktemp("claims")
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    module = "benchmarks.claims.diffusion_weightings"
    done = subprocess.run(
        [sys.executable, "-m", module, "--short", f"--output={output}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((output / "diffusion_weightings.json").read_text())


def test_every_weighting_has_its_metrics_for_every_seed(short):
    printed, result = short
    runs = result["networks"]
    assert list(runs) == list(dd.NETWORKS)
    for of_network in runs.values():
        assert list(of_network) == list(dd.WEIGHTINGS)
    assert all(name in printed for name in dd.WEIGHTINGS)
    for run in (run for of_network in runs.values() for run in of_network.values()):
        assert run["rate"] in result["settings"]["learning_rates"]
        for metric in diffusion_weightings.METRICS:
            assert len(run[metric]) == result["settings"]["seeds"] == 2
            assert all(np.isfinite(value) for value in run[metric])
        assert np.shape(run["errors"]) == (2, len(result["log_snrs"]))


def test_every_claim_has_a_control_an_interval_and_the_verdict_that_follows(short):
    printed, result = short
    for claim in result["claims"]:
        low, high = claim["interval"]
        assert low <= claim["difference"] <= high
        assert {claim["weighting"], claim["control"]} <= set(dd.WEIGHTINGS)
        assert claim["network"] in dd.NETWORKS
        holds_zero = low <= 0 <= high
        assert (claim["verdict"] == "open") == holds_zero
        if not holds_zero:
            assert (claim["verdict"] == "shown") == (high < 0)
        assert claim["paper"] in printed
    metrics = sum(len(claim.metrics) for claim in diffusion_weightings.CLAIMS)
    assert len(result["claims"]) == metrics * len(dd.NETWORKS)


def test_the_results_say_where_they_were_measured_and_what_real_digits_reach(short):
    _, result = short
    assert result["versions"]["jax"] and result["device"]["platform"]
    assert set(result["training_digits"]) == {"frechet", "sliced"}
    assert 0 < result["classifier_accuracy"] <= 1


def test_parts_of_the_digits_are_disjoint_and_cover_them():
    digits = dd.load()
    parts = np.concatenate([digits.train, digits.tune, digits.test])
    assert parts.shape == (1797, 64)
    assert parts.min() == -1 and parts.max() == 1
    assert len(np.unique(parts, axis=0)) == 1797


def test_distances_are_zero_for_equal_clouds_and_those_of_shifted_gaussians():
    cloud = np.random.default_rng(0).normal(size=(400, 5))
    assert dd.frechet_distance(cloud, cloud) == pytest.approx(0, abs=1e-6)
    assert dd.sliced_distance(cloud, cloud) == 0
    shift = np.array([3.0, 4.0, 0.0, 0.0, 0.0])
    assert dd.frechet_distance(cloud, cloud + shift) == pytest.approx(25, rel=1e-6)
    # The mean square of a shift's projection is its square over the dimension.
    moved = dd.sliced_distance(cloud, cloud + shift, projections=4096)
    assert moved == pytest.approx(5**0.5, rel=0.05)
