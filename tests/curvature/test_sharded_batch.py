"""Curvature of a batch over several devices is that of the whole batch."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def test_estimates_and_products_are_of_the_whole_batch():
    flags = "--xla_force_host_platform_device_count=8"
    process = subprocess.run(
        [sys.executable, "-m", "tests.curvature.sharded_batch"],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1] == "equal"
