"""The coordinatewise LSTM for meta-training on the CPU, in blocks that stay in cache.

Written with tensor operations, a step and its gradient carry some 1,500 numbers per coordinate through memory, and
that is what meta-training waits for. Here a block of coordinates goes through all layers before the next one comes;
only the states are kept for the gradient, which computes the gates again. Matrix products are torch's; what is between
them is one loop each way, compiled by numba.
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
except ImportError:  # numba is not installed
    gates = None  # type: ignore[assignment]

BLOCK = 4096
"""Coordinates at a time: their gates take 1.3 MB."""


def fuse(rule: Rule) -> Rule:
    """Give a rule on the CPU the fast cell, with the same parameters, if numba is there; else leave it as it is."""
    if gates is not None and next(rule.parameters()).device.type == "cpu":
        gates.set_threads(torch.get_num_threads())
        fused = object.__new__(FusedLSTM)
        fused.__dict__ = rule.cell.__dict__
        rule.cell = fused
    return rule


class FusedLSTM(CoordinateLSTM):
    """A `CoordinateLSTM` whose gradient is written by hand; float32 on the CPU."""

    def forward(self, features: Tensor, context: Tensor, state: State) -> tuple[Tensor, State]:
        """As `CoordinateLSTM.forward`; the features are constants of the rule, and get no gradient."""
        if not torch.is_grad_enabled():
            return super().forward(features, context, state)
        lead, n = features.shape[:-2], features.shape[-2]
        groups = lead.numel()
        biases = [bias.expand(groups, -1) for bias in self.bias]
        if self.weight_context.shape[1]:
            biases[0] = F.linear(context, self.weight_context, self.bias[0]).reshape(groups, -1)
        weights = [torch.cat(pair, dim=1) for pair in zip(self.weight_ih, self.weight_hh, strict=True)]
        keys = [f"{name}{layer}" for layer in range(self.layers) for name in "hc"]
        states = [state[key].reshape(groups, n, self.hidden) for key in keys]
        head = torch.cat([self.head.weight.flatten(), self.head.bias])
        flat = features.reshape(groups, n, -1)
        output, *new = _Step.apply(flat, head, self.layers, *weights, *biases, *states)
        return output.view(*lead, n), {key: s.view(*lead, n, -1) for key, s in zip(keys, new, strict=True)}


class _Step(torch.autograd.Function):
    """Features (B, n, f), head (H + 1,); per layer: weights (4H, k), biases (B, 4H), and h, c (B, n, H)."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, head: Tensor, layers: int, *rest: Tensor) -> tuple[Tensor, ...]:
        weights, biases, states = rest[:layers], rest[layers : 2 * layers], rest[2 * layers :]
        new = [torch.empty_like(s) for s in states]
        output = features.new_empty(features.shape[:2])
        for b, rows in _blocks(features):
            x = features[b, rows]
            for k in range(layers):
                h, c, new_h, new_c = (s[b, rows] for s in (*states[2 * k : 2 * k + 2], *new[2 * k : 2 * k + 2]))
                _layer(x, h, c, weights[k], biases[k][b], new_h, new_c)
                x = new_h
            torch.addmv(head[-1:], x, head[:-1], out=output[b, rows])
        ctx.layers = layers
        ctx.save_for_backward(features, head, *rest)
        return output, *new

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, *grad_new: Tensor) -> tuple[Tensor | None, ...]:
        features, head, *rest = ctx.saved_tensors
        layers = ctx.layers
        weights, biases, states = rest[:layers], rest[layers : 2 * layers], rest[2 * layers :]
        grads = [torch.zeros_like(t) for t in rest[: 2 * layers]] + [torch.empty_like(s) for s in states]
        grad_head = torch.zeros_like(head)
        for b, rows in _blocks(features):
            passed, x = [], features[b, rows]
            for k in range(layers):
                h, c = states[2 * k][b, rows], states[2 * k + 1][b, rows]
                new_h, new_c = torch.empty_like(h), torch.empty_like(c)
                passed.append((*_layer(x, h, c, weights[k], biases[k][b], new_h, new_c), new_c))
                x = new_h
            here = grad_output[b, rows]
            grad_head[:-1] += here @ x
            grad_head[-1] += here.sum()
            down = torch.outer(here, head[:-1])
            for k in reversed(range(layers)):
                inputs, squashed, new_c = passed[k]
                pre = torch.empty_like(squashed)
                down += grad_new[2 * k][b, rows]
                grad_c = grad_new[2 * k + 1][b, rows]
                old_c, grad_old = states[2 * k + 1][b, rows], grads[2 * layers + 2 * k + 1][b, rows]
                gates.backward(*(t.numpy() for t in (squashed, old_c, new_c, down, grad_c, pre, grad_old)))
                grads[k].addmm_(pre.mT, inputs)
                grads[layers + k][b] += pre.sum(0)
                down, grads[2 * layers + 2 * k][b, rows] = (pre @ weights[k]).tensor_split([-h.shape[1]], dim=1)
                down = down.contiguous()
        return None, grad_head, None, *grads


def _layer(
    x: Tensor, h: Tensor, c: Tensor, weight: Tensor, bias: Tensor, new_h: Tensor, new_c: Tensor
) -> tuple[Tensor, Tensor]:
    """Advance a block by one layer, into h' and c'; gives [x, h] and the squashed gates."""
    inputs = torch.cat([x, h], dim=1)
    sums = inputs @ weight.mT
    squashed = torch.empty_like(sums)
    gates.forward(*(t.numpy() for t in (sums, bias, c, squashed, new_h, new_c)))
    return inputs, squashed


def _blocks(features: Tensor) -> Iterator[tuple[int, slice]]:
    """Instance and rows of every block."""
    for b in range(features.shape[0]):
        for start in range(0, features.shape[1], BLOCK):
            yield b, slice(start, start + BLOCK)
