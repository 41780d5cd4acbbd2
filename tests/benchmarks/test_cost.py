"""The cost benchmark measures what it says."""

import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import optax
import pytest

from benchmarks import _timing

ROOT = pathlib.Path(__file__).parents[2]


def cost(*arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.cost", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_state_bytes_and_least_bytes_are_exact(tmp_path):
    done = cost(
        "--methods=scale_by_lion_k,add_cautious_decayed_weights",
        "--side=64",
        "--repeats=4",
        f"--output={tmp_path}",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lion, decay = json.loads((tmp_path / "cost.json").read_text())["rows"]
    assert lion["state bytes a parameter"] == 4
    assert lion["elementwise"] and decay["elementwise"]
    assert decay["state bytes a parameter"] == 0
    # One fused pass moves the least: gradient and parameter in, update out.
    assert decay["bytes over least"] == pytest.approx(1.0, abs=0.01)
    for row in (lion, decay):
        assert row["time over peer"] > 0 and row["time over copy"] > 0


def test_a_method_that_needs_more_is_refused(tmp_path):
    done = cost("--methods=scale_by_sophia", f"--output={tmp_path}")
    assert done.returncode != 0
    assert "needs more than gradients and parameters" in done.stderr


def test_a_repeated_update_goes_on_from_its_own_state():
    program = _timing.compiled_update(optax.trace(0.5), jnp.ones((2, 2)))
    call = _timing.repeating(program)
    updates = [call()[0][0, 0].item() for _ in range(3)]
    # Gradients of 0.1: 0.1, 0.15, 0.175, to a rounding of float32.
    assert updates == pytest.approx([0.1, 0.15, 0.175], rel=1e-6)
