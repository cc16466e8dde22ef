"""What is freed is kept: a second block of the same size costs no page faults."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

EMBEDDED = Path(__file__).resolve().parents[3] / "runtime" / "embedded"
PROGRAM = f"""
import resource, sys
sys.path.insert(0, {str(EMBEDDED)!r})
import numpy as np
from popart._engine.host_memory import keep_freed_memory
agreed = keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(64 << 20, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(agreed, faults())
"""


def _run(**environment: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", PROGRAM], env={**os.environ, **environment}, capture_output=True, text=True,
                          timeout=120, check=False)
    assert not done.returncode, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="malloc is told on Linux only")
def test_a_freed_block_is_kept_unless_the_user_says_otherwise() -> None:
    agreed, kept = _run()
    if agreed == "False":
        pytest.skip("this C library has no mallopt")
    refused, returned = _run(POPDET_KEEP_MEMORY="0")
    assert refused == "False" and int(returned) > 10 * max(int(kept), 1)
