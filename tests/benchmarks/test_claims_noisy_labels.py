"""The claim of early-learning regularisation in its short form."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.claims import _digits, noisy_labels

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """What the short run printed, its results, and its folder."""
    output = tmp_path_factory.mktemp("claims")
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.claims.noisy_labels"),
            *("--short", "--seeds=3", f"--output={output}"),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((output / "noisy_labels.json").read_text()), output


def test_every_method_has_its_curves(short):
    _, result, _ = short
    assert set(result["curves"]) == set(noisy_labels.METHODS)
    for curves in result["curves"].values():
        assert set(curves) == {"test", "memorised", "corrected"}
        for curve in map(np.array, curves.values()):
            assert curve.shape == (3, 5) and np.all((curve >= 0) & (curve <= 1))
        # An image is predicted as labelled, as it truly is, or as something else.
        shares = np.add(curves["memorised"], curves["corrected"])
        assert np.all(shares <= 1 + 1e-6)


def test_the_judgement_is_of_the_last_and_of_the_best_epoch(short):
    printed, result, _ = short
    plain, ours = (
        np.array(result["curves"][result["claim"][name]]["test"])
        for name in ("control", "treated")
    )
    judged = {name: each["differences"] for name, each in result["judged"].items()}
    np.testing.assert_allclose(judged["end"], ours[:, -1] - plain[:, -1], atol=1e-12)
    np.testing.assert_allclose(
        judged["lost_by_control"], plain.max(1) - plain[:, -1], atol=1e-12
    )
    np.testing.assert_allclose(
        judged["against_best_epoch"], ours[:, -1] - plain.max(1), atol=1e-12
    )
    shown = result["judged"]["end"]["shown"]
    shown = shown and result["judged"]["lost_by_control"]["shown"]
    assert result["claim"]["shown"] == shown
    assert f"wrong labels: {'shown' if shown else 'not shown'}." in printed


def test_results_say_where_and_on_what_they_were_measured(short):
    _, result, output = short
    start = "python -m benchmarks.claims.noisy_labels --short --seeds=3"
    assert result["command"].startswith(start)
    assert result["versions"]["jax"] and result["device"]["platform"]
    assert result["seeds"] == [0, 1, 2] and result["settings"]["epochs"] == 5
    assert result["data"]["wrong"] == 0.4
    assert (output / "noisy_labels.png").read_bytes().startswith(b"\x89PNG")


def test_exactly_the_share_of_labels_is_wrong_and_no_test_image_is_trained_on():
    labels = _digits.load().labels
    for seed in range(3):
        split = noisy_labels.split(seed, epochs=2)
        assert np.sum(split.given != labels[split.train]) == 520
        assert split.given.min() == 0 and split.given.max() == 9
        every = np.sort(np.concatenate([split.train, split.test]))
        np.testing.assert_array_equal(every, np.arange(1797))
