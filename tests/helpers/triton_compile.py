"""Compile the kernel for GPUs that need not be here, and print what came of it."""

from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from l2o_runtime.kernels import triton_code as code

ARCHITECTURES = (80, 90)


def source(state: str, param: str, normalized: bool, on_device: bool, precision: str, block: int) -> Any:
    """The kernel for some dtypes and options."""
    number = "*fp64" if on_device else "fp32"
    constants: dict[str, Any] = {
        "HIDDEN": 20,
        "PADDED": 32,
        "LAYERS": 2,
        "NORMALIZED": normalized,
        "TANH": normalized,
        "SCALE": 0.1,
        "MAXIMIZE": True,
        "ON_DEVICE": on_device,
        "WIDE": tl.float64 if param == "*fp64" else tl.float32,
        "PRECISION": precision,
        "BLOCK": block,
    }
    constants |= {} if normalized else {"m": None, "v": None}
    special = {"theta": param, "grad": param, "m": state, "v": state, "h": (state,) * 2, "c": (state,) * 2}
    special |= {"good": "*i1", "lr": number, "decay": number, "n": "i32"}
    names = code.advance.arg_names
    signature = {name: "constexpr" if name in constants else special.get(name, "*fp32") for name in names}
    return ASTSource(code.advance, signature, {(names.index(key),): value for key, value in constants.items()})


for options in (
    ("*fp32", "*fp32", True, False, "tf32x3", 64),
    ("*bf16", "*bf16", False, True, "tf32x3", 64),
    ("*fp32", "*fp64", True, False, "ieee", 16),
):
    for architecture in ARCHITECTURES:
        target = GPUTarget("cuda", architecture, 32)
        compiled = triton.compile(source(*options), target=target, options={"num_warps": 4, "enable_fp_fusion": True})
        print(options, architecture, "cubin", len(compiled.asm["cubin"]))
