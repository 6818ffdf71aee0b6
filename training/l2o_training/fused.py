"""The coordinatewise LSTM for meta-training on the CPU, in blocks that stay in cache.

Written with tensor operations, a step and its gradient carry some 1,500 numbers per coordinate through memory, and
that is what meta-training waits for. Here a block of coordinates goes through all layers before the next one comes;
only the states are kept for the gradient, which computes the gates again. Matrix products are torch's; what is between
them is one loop each way, compiled by LLVM.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from l2o_runtime.cells import CoordinateLSTM
from l2o_runtime.gram import State
from l2o_runtime.rule import Rule

try:
    from l2o_training import gates
except ImportError:  # llvmlite is not installed
    gates = None  # type: ignore[assignment]

BLOCK = 2048
"""Coordinates at a time, at most: their gates take 640 KiB, and as much again for the gradient."""


def fuse(rule: Rule) -> Rule:
    """Give a rule on the CPU the fast cell, with the same parameters, if llvmlite is there; else leave it as it is."""
    if gates is not None and next(rule.parameters()).device.type == "cpu":
        fused = object.__new__(FusedLSTM)
        fused.__dict__ = rule.cell.__dict__
        rule.cell = fused
    return rule


class FusedLSTM(CoordinateLSTM):
    """A `CoordinateLSTM` whose gradient is written by hand; float32 on the CPU."""

    def forward(self, features: Tensor, context: Tensor, state: State) -> tuple[Tensor, State]:
        """As `CoordinateLSTM.forward`; the features are constants of the rule, and get no gradient."""
        lead, n = features.shape[:-2], features.shape[-2]
        if n < gates.LEAST:
            return super().forward(features, context, state)
        groups = lead.numel()
        biases = [bias.expand(groups, -1) for bias in self.bias]
        if self.weight_context.shape[1]:
            biases[0] = F.linear(context, self.weight_context, self.bias[0]).reshape(groups, -1)
        weights = [
            torch.cat([ih.expand(groups, -1, -1), hh.expand(groups, -1, -1), bias.unsqueeze(-1)], dim=-1)
            for ih, hh, bias in zip(self.weight_ih, self.weight_hh, biases, strict=True)
        ]
        keys = [f"{name}{layer}" for layer in range(self.layers) for name in "hc"]
        # Coordinates come last in memory; what the next step gets are views, which it need not copy.
        states = [state[key].reshape(groups, n, self.hidden).mT.contiguous() for key in keys]
        head = torch.cat([self.head.weight, self.head.bias.unsqueeze(-1)], dim=1)
        output, *new = _Step.apply(features.detach().reshape(groups, n, -1).mT, head, *weights, *states)
        return output.mT.reshape(*lead, n, -1), {key: s.mT.view(*lead, n, -1) for key, s in zip(keys, new, strict=True)}


class _Step(torch.autograd.Function):
    """Features (B, f, n), head (K, H + 1); weights (B, 4H, k + H + 1) of every layer; h, c (B, H, n) of every layer."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, head: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        layers = len(rest) // 3
        weights, states = rest[:layers], rest[layers:]
        new = [torch.empty_like(s) for s in states]
        output = features.new_empty(features.shape[0], len(head), features.shape[2])
        scratch = features.new_empty(weights[0].shape[1] * BLOCK)
        for b, start, stop in _blocks(features):
            x = features[b, :, start:stop]
            for k in range(layers):
                h, c, new_h, new_c = (s[b] for s in (*states[2 * k : 2 * k + 2], *new[2 * k : 2 * k + 2]))
                sums = _products(weights[k][b], x, h[:, start:stop], scratch)[1]
                gates.forward(start, sums, c, new_h, new_c)
                x = new_h[:, start:stop]
            torch.addmm(head[:, -1:], head[:, :-1], x, out=output[b, :, start:stop])
        ctx.save_for_backward(features, head, *rest, *new)
        return output, *new

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, *grad_new: Tensor) -> tuple[Tensor | None, ...]:
        features, head, *rest = ctx.saved_tensors
        layers = len(rest) // 5
        weights, states, new = rest[:layers], rest[layers : 3 * layers], rest[3 * layers :]
        grad_new = tuple(g.contiguous() for g in grad_new)
        grad_weights = [torch.zeros_like(w) for w in weights]
        grad_states = [torch.empty_like(s) for s in states]
        grad_head = torch.zeros_like(head)
        hidden = states[0].shape[1]
        buffers = features.new_empty(2, 4 * hidden * BLOCK)
        for b, start, stop in _blocks(features):
            here, top = grad_output[b, :, start:stop], new[-2][b, :, start:stop]
            grad_head[:, :-1] += here @ top.mT
            grad_head[:, -1] += here.sum(1)
            down = head[:, :-1].mT @ here
            for k in reversed(range(layers)):
                x = new[2 * k - 2][b, :, start:stop] if k else features[b, :, start:stop]
                h, c, new_c, grad_h, grad_c = (
                    s[b] for s in (*states[2 * k : 2 * k + 2], new[2 * k + 1], *grad_new[2 * k : 2 * k + 2])
                )
                inputs, sums = _products(weights[k][b], x, h[:, start:stop], buffers[0])
                pre = buffers[1, : sums.numel()].view_as(sums)
                grad_old_h, grad_old_c = grad_states[2 * k][b], grad_states[2 * k + 1][b]
                gates.backward(start, sums, down, pre, c, new_c, grad_h, grad_c, grad_old_c)
                grad_weights[k][b].addmm_(pre, inputs.mT)
                back = weights[k][b].mT
                torch.mm(back[-hidden - 1 : -1], pre, out=grad_old_h[:, start:stop])
                if k:
                    down = back[:hidden] @ pre
        return None, grad_head, *grad_weights, *grad_states


def _products(weight: Tensor, x: Tensor, h: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """[x; h; 1] and the pre-activations W [x; h; 1] of a block, the latter in `scratch`."""
    inputs = torch.cat([x, h, h.new_ones(1, h.shape[1])])
    sums = scratch[: weight.shape[0] * h.shape[1]].view(weight.shape[0], -1)
    return inputs, torch.mm(weight, inputs, out=sums)


def _blocks(features: Tensor) -> Iterator[tuple[int, int, int]]:
    """Instance, first coordinate and end of every block; the blocks are of one size, and none too small."""
    n = features.shape[2]
    count = -(-n // BLOCK)
    for b in range(features.shape[0]):
        for i in range(count):
            yield b, n * i // count, n * (i + 1) // count
