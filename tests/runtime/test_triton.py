"""The Triton kernel, in processes of their own: Triton reads TRITON_INTERPRET when it is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

HERE = Path(__file__).parents[1] / "helpers"


def run(*arguments: str | Path, **environment: str) -> str:
    """Run Python on its own, with what this process can import; it must succeed."""
    path = os.pathsep.join([str(HERE), *filter(None, sys.path)])
    full = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, *arguments], env=full, capture_output=True, text=True, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    return done.stdout


def cases(**environment: str) -> str:
    return run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/helpers/triton_cases.py", **environment)


def test_equals_the_plain_loop_in_the_interpreter():
    pytest.importorskip("triton")
    assert " passed" in cases(TRITON_INTERPRET="1")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the kernel runs in Triton's interpreter only")
def test_equals_the_plain_loop_on_a_gpu():
    pytest.importorskip("triton")
    assert " passed" in cases(TRITON_INTERPRET="0")


def test_compiles_for_gpus_that_are_not_here(tmp_path):
    """The interpreter takes what the compiler would not."""
    pytest.importorskip("triton")
    if sys.platform != "linux":
        pytest.skip("Triton's compiler comes with its Linux packages")
    assert "cubin" in run(HERE / "triton_compile.py", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))


def test_the_package_works_without_triton():
    without = "import sys; sys.modules['triton'] = None; "
    run("-c", without + "import l2o_runtime, l2o_runtime.kernels.triton, l2o_runtime.kernels.triton_code")


def test_triton_is_imported_when_it_is_needed():
    code = "import sys, l2o_runtime.kernels.triton; assert 'l2o_runtime.kernels.triton_code' not in sys.modules"
    run("-c", code)
