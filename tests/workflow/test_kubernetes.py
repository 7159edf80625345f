"""The profile for Kubernetes, as far as it can be seen without a cluster: a dry run takes its settings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_a_dry_run_takes_the_settings_of_the_kubernetes_profile(project):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(["profiles/kubernetes", *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    done = subprocess.run(
        [Path(sys.executable).parent / "snakemake", "--profile", "profiles/kubernetes", "--dry-run", "--forceall"],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "train_adapter" in done.stdout
