"""The tiered rule for meta-training on the CPU: its sums, its steps and their gradient in compiled code.

Features of coordinates are constants of the rule, so that the network per coordinate is differentiated by its
weights alone. These are a tensor's: gains, biases and magnitude are in them, and torch takes the gradient on from
there, through an LSTM with a handful of rows.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from l2o_runtime.kernels.emit import I64, POINTER, Vector, broadcast, load, loop, store
from l2o_runtime.kernels.machine import Compiled, once, widest
from l2o_runtime.kernels.pieces_code import module_of_pieces
from l2o_runtime.kernels.tiered_code import SCALARS, TOTALS, WEIGHTS, network, tiered_module
from l2o_runtime.layout import Layout
from l2o_runtime.rules.features import LARGEST_SIZE, combine, lowest_root, step_size
from l2o_runtime.rules.restraint import share as restrained_share
from l2o_runtime.rules.statistics import AVERAGES, BETAS, average
from l2o_runtime.rules.tiered import SCALARS as IN_STEERING
from l2o_runtime.rules.tiered import UNITS, TieredRule
from l2o_runtime.rules.tiered_features import INPUTS, directions, look
from l2o_runtime.state import State
from l2o_training.fused.pieces import Pieces

DECAYS = torch.tensor(BETAS)

SLOPES = 1 + WEIGHTS
"""Derivatives that a piece gives: by the magnitude, then by the weights."""


class FusedTieredRule(TieredRule):
    """A `TieredRule` whose coordinates are compiled; float32 on the CPU."""

    def sums(self, param: Tensor, grad: Tensor, state: State, layout: Layout) -> Tensor:
        """As `TieredRule.sums`; nothing is differentiated."""
        pieces = Pieces.of(layout, param.shape[:-1])
        numbers = param.new_zeros(*param.shape[:-1], 1, SCALARS + WEIGHTS)
        numbers[..., : len(BETAS)] = _corrections(state)
        arrays = _arrays(param, grad, state)
        results = torch.zeros(pieces.count, TOTALS, widest(), dtype=torch.float64)
        expanded = numbers.expand(*param.shape[:-1], pieces.tensors, -1)
        pieces.run(_compile(False)[0]["observe"], expanded, arrays, results)
        return pieces.collect(results)[..., 1:]

    def forward(
        self,
        param: Tensor,
        grad: Tensor,
        loss: Tensor,
        coordinates: State,
        optimization: State,
        layout: Layout | None = None,
    ) -> tuple[Tensor, State, State]:
        """As `Rule.forward`."""
        assert layout is not None
        steering, optimization = self.perceive(param, grad, loss, coordinates, optimization, layout)
        arrays = _arrays(param, grad, coordinates)
        numbers = self.numbers(steering, _corrections(coordinates))
        restrained = self.config.noise_floor is not None
        delta, *averages = _Step.apply(Pieces.of(layout, param.shape[:-1]), restrained, numbers, *arrays)
        new = dict(zip(AVERAGES, averages, strict=True)) | {"step": coordinates["step"] + 1}
        return delta, new | self.context.remember(param, grad, coordinates), optimization

    def numbers(self, steering: Tensor, corrections: Tensor) -> Tensor:
        """What the code reads besides coordinates, for every tensor: (..., S, SCALARS + WEIGHTS).

        Args:
            steering: (..., S, c).
            corrections: (..., 1, k) 1 / (1 − βᵗ) of every average.
        """
        size_root, size_fast, rho, noise, longest, magnitude = steering[..., :IN_STEERING].unbind(-1)
        constants = [lowest_root(size_root), size_root, 1 / rho, (-size_fast).exp(), noise, longest]
        gain, bias = steering[..., IN_STEERING:].chunk(2, dim=-1)
        first = torch.cat([self.into.weight, self.into.bias.unsqueeze(-1)], dim=-1) * (1 + gain).unsqueeze(-1)
        first = torch.cat([first[..., :-1], first[..., -1:] + bias.unsqueeze(-1)], dim=-1)
        last = torch.cat([self.out.weight, self.out.bias.unsqueeze(-1)], dim=-1).flatten()
        parts = [
            corrections.expand(*magnitude.shape, -1),
            torch.stack([*(x.detach() for x in constants), magnitude], dim=-1),
            first.flatten(-2),
            last.expand(*magnitude.shape, -1),
        ]
        return torch.cat(parts, dim=-1)


def _arrays(param: Tensor, grad: Tensor, state: State) -> list[Tensor]:
    """What the code reads of coordinates: gradients, parameters and averages, (..., n) each, contiguous."""
    return [array.detach().contiguous() for array in (grad, param, *(state[key] for key in AVERAGES))]


def _corrections(state: State) -> Tensor:
    """1 / (1 − βᵗ) of every average with the newest gradient in: (..., 1, k)."""
    step = state["step"][..., :1, None] + 1
    return 1 / (1 - DECAYS**step)


class _Step(torch.autograd.Function):
    """Steps (..., n) and new averages, from numbers (..., S, k), gradients, parameters and averages (..., n)."""

    @staticmethod
    def forward(ctx: Any, pieces: Pieces, restrained: bool, numbers: Tensor, *arrays: Tensor) -> tuple[Tensor, ...]:
        grad, param, *averages = arrays
        delta, new = torch.empty_like(param), [average.clone() for average in averages]
        pieces.run(_compile(restrained)[0]["update"], numbers, [grad, param, *new, delta])
        ctx.pieces, ctx.restrained = pieces, restrained
        ctx.save_for_backward(numbers, *arrays)
        ctx.mark_non_differentiable(*new)
        return delta, *new

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_delta: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        pieces, (numbers, *arrays) = ctx.pieces, ctx.saved_tensors
        results = numbers.new_zeros(pieces.count, SLOPES, widest())
        pieces.run(_compile(ctx.restrained)[0]["gradient"], numbers, [*arrays, grad_delta.contiguous()], results)
        slopes, total = pieces.collect(results), torch.zeros_like(numbers)
        total[..., SCALARS - 1 :] = slopes
        return None, None, total, *[None] * len(arrays)


@once
def _compile(restrained: bool) -> tuple[dict[str, Callable[[int, int], None]], list[Compiled]]:
    """The functions by name, and what keeps them alive; once per process."""
    dtypes = (torch.float32,) * len(AVERAGES)
    kinds = [POINTER] * (3 + len(AVERAGES) + 2)
    gradient = functools.partial(_gradient, restrained)
    compiled = [
        Compiled(tiered_module, widest(), dtypes, restrained),
        Compiled(functools.partial(module_of_pieces, widest(), {"gradient": (kinds, gradient)})),
    ]
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_void_p)
    names = {"observe": 0, "update": 0, "gradient": 1}
    return {name: kind(compiled[index].address(name)) for name, index in names.items()}, compiled


def _gradient(
    restrained: bool, builder: Any, arguments: Sequence[Any], size: int, start: Any, blocks: Any, width: int
) -> None:
    """Add to the derivatives by the magnitude and the weights, `size` coordinates at a time.

    ∂L/∂W of both layers are sums over coordinates, kept in memory that stays in the first cache: there are more than
    registers for them.
    """
    numbers, grad, param, *states, slopes, sums = arguments
    scalars = [broadcast(builder, builder.gep(numbers, [I64(i)]), size) for i in range(SCALARS)]

    def weight(index: int) -> Vector:
        return broadcast(builder, builder.gep(numbers, [I64(SCALARS + index)]), size)

    def add(index: int, factor: Vector, value: Vector | None = None) -> None:
        place = builder.gep(sums, [I64(index * width)])
        total = load(builder, place, size)
        store(builder, total + factor if value is None else factor.fma(value, total), place)

    def body(index: Any, _: list[Any]) -> list[Any]:
        at = [builder.add(start, builder.mul(index, I64(size)))]
        g, theta, *old, through = (
            load(builder, builder.gep(pointer, at), size) for pointer in (grad, param, *states, slopes)
        )
        floor, size_root, inverse_rho, inverse_fast, noise, longest, magnitude = scalars[len(BETAS) :]
        new = average(g, old, scalars[: len(BETAS)])
        seen = look(theta * inverse_rho, new, floor, size_root)
        hidden, output = network(seen.features, weight)
        if restrained:
            through = through * restrained_share(*seen.relative, noise)[0]
        combined = directions(seen, new, inverse_fast)
        delta = combine(output, combined)
        add(0, through, delta.clamp(-longest, longest))
        through = (through * magnitude).where(delta.abs() < longest, 0.0)
        scale = through * step_size(output[0]) * -2.0
        within = (through * delta * 2.0).where(output[0].abs() < LARGEST_SIZE, 0.0)
        back = [g.like(0.0)] * UNITS
        for row, slope in enumerate([within, *(scale * direction for direction in combined[1:])]):
            first = UNITS * (INPUTS + 1) + row * (UNITS + 1)
            for unit, value in enumerate(hidden):
                add(1 + first + unit, slope, value)
                back[unit] = slope.fma(weight(first + unit), back[unit])
            add(1 + first + UNITS, slope)
        for unit, (slope, value) in enumerate(zip(back, hidden, strict=True)):
            active = slope.where(value > 0.0, 0.0)
            first = 1 + unit * (INPUTS + 1)
            for column, feature in enumerate(seen.features):
                add(first + column, active, feature)
            add(first + INPUTS, active)
        return []

    loop(builder, blocks, [], body)
