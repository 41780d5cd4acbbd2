"""Eight devices, all methods in one process."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def test_eight_devices_give_the_numbers_of_one_and_shard_the_state():
    flags = "--xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    process = subprocess.run(
        [sys.executable, "-m", "tests.conformance.eight_devices"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout.splitlines()[-1])
    assert report["devices"] == 8
    messages = [f"METHOD {n}\n{text}" for n, text in report["failures"].items()]
    assert not messages, "\n\n" + "\n".join(messages)
