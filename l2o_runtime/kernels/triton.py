"""The GPU path: a rule's step over one parameter as one Triton kernel.

The kernel reads every number that it needs on the device and allocates nothing that depends on one, so that steps can
be captured in a CUDA graph; run one step before the capture, for the first launch compiles. In Triton's interpreter
(TRITON_INTERPRET=1) it runs on CPU tensors. It has not been timed on a GPU yet.
"""

from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor

from l2o_runtime.kernels import Kernel
from l2o_runtime.rules.base import Rule
from l2o_runtime.rules.coordinate_lstm import CoordinateLSTM
from l2o_runtime.rules.lstm import LSTMRule, usual
from l2o_runtime.state import State
from l2o_runtime.stepping.parts import Part

MAX_HIDDEN = 64
"""Gates of larger cells would not fit into a GPU's registers."""

Precision = Literal["ieee", "tf32x3", "tf32"]


def supported(rule: Rule) -> TypeGuard[LSTMRule]:
    """Whether the kernel takes a rule: the papers' LSTM and features, unrestrained; not on AMD's GPUs."""
    small = rule.config.hidden <= MAX_HIDDEN
    known = rule.config.features in ("log_sign", "normalized") and rule.config.noise_floor is None
    return isinstance(rule, LSTMRule) and usual(rule.config) and small and known and torch.version.hip is None


def padded(size: int) -> int:
    """The width of a tile for so many numbers: a power of two, and at least 16, for matrix products need that.

    >>> [padded(size) for size in (2, 16, 20, 33)]
    [16, 16, 32, 64]
    """
    return max(16, 1 << (size - 1).bit_length())


def pack_weights(cell: CoordinateLSTM) -> Tensor:
    """(layers, 2, 4, p, p): weights of input and h, gate by gate, transposed, padded with zeros."""
    hidden, width = cell.hidden, padded(cell.hidden)
    packed = torch.zeros(cell.layers, 2, 4, width, width, device=cell.head.weight.device)
    for layer, pair in enumerate(zip(cell.weight_ih, cell.weight_hh, strict=True)):
        for kind, weight in enumerate(pair):
            packed[layer, kind, :, : weight.shape[1], :hidden] = weight.detach().view(4, hidden, -1).mT
    return packed


def pack_rows(cell: CoordinateLSTM, rows: Tensor) -> Tensor:
    """(4·p, …) from (4·hidden, …): every gate padded with zeros."""
    packed = rows.new_zeros(4, padded(cell.hidden), *rows.shape[1:])
    packed[:, : cell.hidden] = rows.detach().view(4, cell.hidden, *rows.shape[1:])
    return packed.flatten(0, 1)


def numbers(values: list[float | Tensor], device: torch.device) -> tuple[list[Any], bool]:
    """Numbers for the kernel: Python's, or, if any is a tensor on the device, all as tensors () float64 there.

    Returns:
        The numbers, and whether they are on the device.
    """
    if not any(isinstance(value, Tensor) and value.device == device for value in values):
        return [float(value) for value in values], False
    full = [
        value.double().reshape(())
        if isinstance(value, Tensor) and value.device == device
        else torch.full((), float(value), dtype=torch.float64, device=device)  # a fill can be captured, a copy cannot
        for value in values
    ]
    return full, True


def remember(rule: LSTMRule, part: Part, good: Tensor) -> None:
    """Write the context's state per coordinate: the exact window, which no large model has."""
    if not rule.context.coordinate_spec:
        return
    for piece in part.chunks():
        for key, new in rule.context.remember(piece.theta.float(), piece.grad, piece.state).items():
            piece.state[key].copy_(torch.where(good, new, piece.state[key]))


class TritonKernel(Kernel):
    """A frozen rule's step.

    Args:
        rule: on its device; `supported`.
        precision: of the matrix products. "tf32x3" makes up for the precision of tensor cores with three products;
            "ieee" is float32 without tensor cores, which is more exact and has to be slower: it is bound by
            arithmetic. "tf32" is the fastest, and misses 1e-5.
        block: coordinates per program, a power of two from 16 on; None chooses.
        warps: per program.
    """

    def __init__(self, rule: LSTMRule, precision: Precision = "tf32x3", block: int | None = None, warps: int = 4):
        assert supported(rule), "check `supported` first"
        cell = rule.cell
        self.rule = rule
        self.precision = precision
        self.width = padded(cell.hidden)
        # As many as fit into the registers, by the compiler's report: plain float32 products hold all weights in them.
        fit = 16 if precision == "ieee" else min(128, 2**16 // self.width**2)
        self.block = fit if block is None else block
        self.warps = warps
        self.weights = pack_weights(cell)
        self.bias = torch.stack([pack_rows(cell, bias) for bias in cell.bias])
        self.weight_context = pack_rows(cell, cell.weight_context)
        self.head = torch.zeros(self.width + 1, device=cell.head.weight.device)
        self.head[: cell.hidden] = cell.head.weight.detach()[0]
        self.head[-1] = cell.head.bias.detach()[0]

    @torch.no_grad()
    def update(self, parts: list[Part], steering: list[Tensor], good: Tensor) -> None:
        """Advance parts, one after the other."""
        for part, row in zip(parts, steering, strict=True):
            self.advance(part, row.squeeze(0), good)

    def advance(self, part: Part, context: Tensor, good: Tensor) -> None:
        """Advance all coordinates of a part in place, if the step is good; `part.finish` counts it.

        Args:
            part: its parameter and state are written.
            context: (c,).
            good: () bool.
        """
        if len(part.theta) == 0:
            return
        with torch.autocast(context.device.type, enabled=False):
            bias = torch.addmv(self.bias[0], self.weight_context, context) if len(context) else self.bias[0]
        remember(self.rule, part, good)
        own = {key: part.state[key] for key in (*self.rule.cell.coordinate_spec, "m", "v") if key in part.state}
        self._launch(part, {"theta": part.theta} | own, bias, good)

    def _launch(self, part: Part, written: State, bias: Tensor, good: Tensor) -> None:
        """Run the kernel on contiguous tensors, and write back where that took copies."""
        import triton.language as tl

        from l2o_runtime.kernels import triton_code as code

        config, group, device = self.rule.config, part.group, part.theta.device
        flat = {key: value.contiguous() for key, value in written.items()}
        values, on_device = numbers([part.lr, part.decay], device)
        count = len(part.theta)
        with torch.cuda.device_of(part.theta):
            code.advance[(-(-count // self.block),)](
                flat["theta"],
                part.grad.contiguous(),
                flat.get("m"),
                flat.get("v"),
                tuple(flat[f"h{layer}"] for layer in range(config.layers)),
                tuple(flat[f"c{layer}"] for layer in range(config.layers)),
                part.state["step"],
                good,
                bias,
                self.bias,
                self.weights,
                self.head,
                *values,
                count,
                HIDDEN=config.hidden,
                PADDED=self.width,
                LAYERS=config.layers,
                NORMALIZED=config.features == "normalized",
                TANH=config.bounded,
                SCALE=config.output_scale,
                MAXIMIZE=bool(group["maximize"]),
                ON_DEVICE=on_device,
                WIDE=tl.float64 if part.theta.dtype == torch.float64 else tl.float32,
                PRECISION=self.precision,
                BLOCK=self.block,
                num_warps=self.warps,
                enable_fp_fusion=True,
            )
        for key, value in flat.items():
            if value is not written[key]:
                written[key].copy_(value)
