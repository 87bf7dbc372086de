"""The script that the README names: sharded training, then one process from its checkpoint, against one process throughout."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from readme_blocks import ROOT

SCRIPT = ROOT / "profiles" / "train_fsdp.py"


def test_save_and_resume(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import train_fsdp

    whole = train_fsdp.main(["--steps", "13", "--eager", "--checkpoint", str(tmp_path / "whole")])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launch, "--steps", "10", "--eager", "--checkpoint", str(tmp_path / "sharded")],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    loss = float(re.search(r"step 10: loss (\S+)", done.stdout)[1])
    assert loss == pytest.approx(whole[9], abs=2e-4)
    resumed = train_fsdp.main(["--steps", "13", "--resume", "--eager", "--checkpoint", str(tmp_path / "sharded")])
    assert resumed == pytest.approx(whole[10:], rel=1e-4)
    assert "steps 10 to 13 on 1 processes" in capsys.readouterr().out
