"""The claim of LDAM-DRW in its short form, from the command line."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.claims import _digits, long_tail

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """What the short run printed, its results, and its folder."""
    output = tmp_path_factory.mktemp("claims")
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.claims.long_tail"),
            *("--short", f"--output={output}"),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((output / "long_tail.json").read_text()), output


def test_every_method_has_accuracies_of_all_classes_and_seeds(short):
    _, result, _ = short
    assert set(result["methods"]) == set(long_tail.METHODS)
    for found in result["methods"].values():
        assert np.shape(found["classes"]) == (2, 10)
        parts = {name: np.array(curve) for name, curve in found["curves"].items()}
        assert set(parts) == {"head", "middle", "tail", "mean"}
        for curve in (np.array(found["classes"]), *parts.values()):
            assert np.all((curve >= 0) & (curve <= 1))
        last = np.mean(found["classes"], 1)
        np.testing.assert_allclose(parts["mean"][:, -1], last, rtol=1e-12)


def test_the_learning_rate_is_the_best_on_other_seeds(short):
    for found in short[1]["methods"].values():
        tuning = found["tuning"]
        assert set(tuning) == {f"{rate:g}" for rate in long_tail.LEARNING_RATES}
        assert tuning[f"{found['learning_rate']:g}"] == max(tuning.values())


def test_the_verdict_is_that_of_the_paired_differences(short):
    printed, result, _ = short
    claim, methods = result["claim"], result["methods"]
    tails = [
        np.array(methods[claim[name]]["curves"]["tail"])[:, -1]
        for name in ("treated", "control")
    ]
    np.testing.assert_allclose(claim["differences"], tails[0] - tails[1], atol=1e-12)
    assert claim["shown"] == (claim["interval"][0] > 0)
    assert "Claim, LDAM-DRW" in printed and "logit adjustment" in printed


def test_results_say_where_and_on_what_they_were_measured(short):
    _, result, output = short
    assert result["command"].startswith("python -m benchmarks.claims.long_tail --short")
    assert result["versions"]["jax"] and result["device"]["platform"]
    assert result["data"]["images"] == 1797 and result["seeds"] == [0, 1]
    assert result["settings"]["counts"] == [100, 60, 36, 22, 13, 8, 5, 3, 2, 1]
    assert (output / "long_tail.png").read_bytes().startswith(b"\x89PNG")


def test_a_split_is_long_tailed_and_differs_from_seed_to_seed():
    labels = _digits.load().labels
    first, other = (long_tail.split(seed, epochs=2) for seed in (0, 1))
    for split in (first, other):
        assert len(set(split.index.tolist())) == long_tail.COUNTS.sum()
        found = np.bincount(labels[split.index], minlength=10)
        np.testing.assert_array_equal(found, split.counts)
        np.testing.assert_array_equal(found[split.classes], long_tail.COUNTS)
    assert first.classes.tolist() != other.classes.tolist()


def test_a_difference_is_shown_only_if_its_interval_is_above_0():
    # Mean 2, deviation 1, three seeds: 2 +- 4.303 / sqrt(3).
    judged = _digits.judge(np.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(judged["interval"], [-0.48434, 4.48434], atol=1e-5)
    assert not judged["shown"] and _digits.verdict(judged) == "not shown"
    assert _digits.judge(np.array([2.0, 2.1, 1.9]))["shown"]
    assert _digits.verdict(_digits.judge(np.array([-2.0, -2.1, -1.9]))) == "refuted"
    alone = _digits.judge(np.array([1.0]))
    assert alone["interval"] == [-np.inf, np.inf] and not alone["shown"]
