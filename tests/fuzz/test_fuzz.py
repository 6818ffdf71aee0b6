"""A short run of the fuzzer; tests/fuzz/fuzz_artifacts.py without arguments is the long one."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("fuzz_artifacts.py")


@pytest.mark.parametrize("arguments", [["--inputs", "1500"], ["--inputs", "0", "--exported", "150"]])
def test_hostile_files_are_refused(arguments):
    result = subprocess.run([sys.executable, SCRIPT, *arguments, "--seed", "1"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("0 wrong\n")
