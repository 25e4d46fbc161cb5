"""The Snakefile: the whole batch is planned, in the right order, and bad settings are refused in one sentence."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = [path.stem for path in sorted(ROOT.glob("notebooks/[0-9][0-9]_*.ipynb"))]


def plan(tmp_path: Path, *config: str) -> subprocess.CompletedProcess:
    """Plan the whole batch without running anything; a state folder of its own keeps it from the user's lock."""
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--cores",
        "2",
        "--dry-run",
        "--forceall",
        "--printshellcmds",
        "--nolock",
    ]
    return subprocess.run(
        [*command, "--config", *config],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)},
    )


@pytest.mark.parametrize("scale", ["smoke", "laptop", "gpu"])
def test_every_notebook_is_run_once_with_the_parameters_of_its_scale(tmp_path, scale):
    done = plan(tmp_path, f"scale={scale}", "from=store")
    assert done.returncode == 0, done.stderr
    text = done.stdout + done.stderr
    runs = re.findall(r"s2d\.lab\.notebook run notebooks/(\w+)\.ipynb (\S+) --params (\S+)", text)
    assert sorted(name for name, _, _ in runs) == NOTEBOOKS
    for name, output, params in runs:
        assert output == f"build/{scale}/{name}.ipynb"
        assert params == f"notebooks/params/{scale}/{name}.yaml"


def test_scratch_uses_a_store_of_its_own(tmp_path):
    text = plan(tmp_path, "scale=laptop", "from=scratch").stdout
    assert re.search(r"S2D_STORE=\S*build/store-scratch", text)
    assert "S2D_STORE= " in plan(tmp_path, "scale=laptop", "from=store").stdout


@pytest.mark.parametrize(
    ("config", "message"),
    [("scale=paper", "SCALE=paper has no parameters"), ("from=nothing", "FROM=nothing: choose store")],
)
def test_bad_settings_are_refused(tmp_path, config, message):
    done = plan(tmp_path, config)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
