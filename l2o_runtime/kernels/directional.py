"""The CPU kernel of the directional rule: whole steps, on several threads.

The code is in `directional_code`, for matrices in `orthogonal_code`, and for the few numbers of every tensor in
`steering_code`; where it finds what is in `plan`.
"""

import ctypes
import functools
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from l2o_runtime.config import NoneConfig
from l2o_runtime.contexts import WindowContext
from l2o_runtime.kernels import Kernel
from l2o_runtime.kernels.directional_code import TOTALS, directional_module
from l2o_runtime.kernels.lstm import Scratch, push
from l2o_runtime.kernels.machine import Compiled, once, widest
from l2o_runtime.kernels.orthogonal_code import LARGEST_RANK, orthogonal_module
from l2o_runtime.kernels.pieces import Batch, Code, Dtypes, columns, compiled, corrections, steps_of
from l2o_runtime.kernels.plan import CORRECTIONS, GRAD, LEFT, LENGTH, TRAIL, WEIGHTS, Plan, Wave, age, fill
from l2o_runtime.kernels.steering_code import LARGEST_NETWORK, TOLD, steering_module
from l2o_runtime.kernels.threads import share
from l2o_runtime.kernels.whole import Frame, at_once, compile_whole
from l2o_runtime.rules.directional import MOMENTUM, DirectionalConfig, DirectionalRule, nesterov
from l2o_runtime.rules.orthogonal import orthogonalise_each
from l2o_runtime.rules.steering import TINY
from l2o_runtime.stepping.interpolation import resting, weights
from l2o_runtime.stepping.parts import Part, full_precision, rows

MOVES = ("move", "follow")
"""The code that writes parameters: where they do not trail behind, and where they do."""


@once
def compile_directional(width: int, dtypes: Dtypes) -> tuple[Code, Compiled]:
    """The functions of `directional_code.directional_module`, and what keeps them alive; once per process."""
    return compiled(("observe", "update", "move", "follow", "copy"), directional_module, width, dtypes)


@once
def compile_orthogonal(rank: int, width: int) -> tuple[Code, Compiled]:
    """The function of `orthogonal_code.orthogonal_module`, and what keeps it alive; once per process."""
    return compiled(("orthogonalise",), orthogonal_module, rank, width)


@once
def compile_steering(config: DirectionalConfig) -> tuple[Callable[..., None], Compiled]:
    """The function of `steering_code.steering_module`, and what keeps it alive; once per process."""
    made = Compiled(steering_module, config)
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int64, *[ctypes.c_void_p] * 6)
    return kind(made.address("steer")), made


def steers(config: DirectionalConfig) -> bool:
    """Whether there is code for what steers a rule's tensors."""
    return isinstance(config.context, NoneConfig) and config.hidden <= LARGEST_NETWORK


def network_of(rule: DirectionalRule) -> Tensor:
    """Weights of the network of tensors end to end, and of places, as that code reads them."""
    weights = [rule.into.weight, rule.into.bias, rule.head.weight, rule.head.bias]
    weights += [] if rule.places is None else [rule.places]
    return torch.cat([weight.detach().reshape(-1) for weight in weights])


def tell(plan: Plan) -> None:
    """Tell autograd that parameters were written, as it was done by address."""
    torch.autograd.graph.increment_version([part.param for part in plan.parts])


class DirectionalKernel(Kernel):
    """Sums and steps of one rule; see `l2o_runtime.kernels.Kernel`. It is for whole tensors, not for shards.

    Args:
        rule: frozen, on the CPU, in float32.
    """

    def __init__(self, rule: DirectionalRule):
        self.rule = rule
        self.width = widest()
        config = rule.config
        self.whole = steers(config)
        self.architecture = replace(config, horizon=1, needs_loss=False)
        self.network = network_of(rule).numpy()
        self.scratch: list[Scratch] = []
        self.plan: Plan | None = None
        self.frame: Frame | None = None
        self.lock = threading.Lock()

    def observe(self, parts: list[Part]) -> Tensor:
        """Σ|g| and the rule's sums: (parts, totals) float64, whichever thread adds up which piece."""
        with self._planned(parts) as plan:
            plan.numbers[:, CORRECTIONS] = corrections(steps_of(parts))
            return torch.from_numpy(self._looked(plan))

    def update(self, parts: list[Part], steering: list[Tensor], good: Tensor) -> None:
        """Advance parts."""
        if bool(good):
            told = torch.cat(steering).numpy()
            with self._planned(parts) as plan:
                steps = steps_of(parts)
                plan.numbers[:, CORRECTIONS] = corrections(steps)
                self._advance(plan, told[:, 0], told[:, 1:], steps)

    def step(self, parts: list[Part], loss: Tensor) -> Tensor:
        """As in `Kernel`."""
        with self._planned(parts) as plan:
            against = self._stepped(plan, loss.item())
        for part in () if any(against) else parts:
            part.write_back()
        return torch.tensor([not any(against), *against], device="cpu")

    def forget(self) -> None:
        """As in `Kernel`."""
        self.plan = self.frame = None

    def _stepped(self, plan: Plan, loss: float) -> list[bool]:
        """What is against the step; if nothing is, it was taken."""
        code = self._code(plan.batches[0].dtypes)["copy"]
        code(len(plan.gather), plan.gathering)
        plan.numbers[:, CORRECTIONS] = corrections(plan.steps)
        if self.frame is not None:
            return self._at_once(plan, self.frame, loss)
        totals = self._looked(plan)
        pulse = float(totals[:, 0].sum())
        against = [
            not math.isfinite(pulse),
            not math.isfinite(loss),
            not bool(np.isfinite(totals[:, 1:]).all()),
            pulse == 0,
        ]
        if not any(against):
            length, *mixed = self._steer(plan, totals)
            self._advance(plan, length, np.stack(mixed, axis=1), plan.steps)
            plan.owned[0] += 1
            code(len(plan.scatter), plan.scattering)
        return against

    def _at_once(self, plan: Plan, frame: Frame, loss: float) -> list[bool]:
        """`_stepped` in one call."""
        age(plan.doubles, plan.floats, plan.aged)
        frame.rates[:] = self._rates(plan, plan.steps)
        against = frame.step(compile_whole(self.width)[0], math.isfinite(loss))
        if not any(against):
            tell(plan)
        return against

    def _rates(self, plan: Plan, steps: np.ndarray) -> list[float]:
        """lr of every part, after so many steps; what decay leaves, or takes, and weights of the interpolation are
        filled in.
        """
        rates = [float(part.lr) for part in plan.parts]
        taken = [lr * float(part.decay) for lr, part in zip(rates, plan.parts, strict=True)]
        plan.numbers[:, LEFT] = [-share if plan.trails else 1 - share for share in taken]
        if plan.trails:
            known = {step: weights(step + 1) for step in set(steps.tolist())}
            plan.numbers[:, TRAIL] = [resting(known[step], lr) for step, lr in zip(steps.tolist(), rates, strict=True)]
        return rates

    def _steer(self, plan: Plan, totals: np.ndarray) -> np.ndarray:
        """The length of a step and the weights w of every part, (1 + 4, parts); its states are written."""
        fill(plan.doubles, plan.floats, totals[:, 2:], plan.aged)
        compile_steering(self.architecture)[0](plan.blocks, *plan.steering, self.network.ctypes.data, plan.telling)
        return plan.told[:TOLD, : len(totals)]

    @contextmanager
    def _planned(self, parts: list[Part]) -> Iterator[Plan]:
        """Where everything is; what does not change between steps is kept."""
        threads = torch.get_num_threads()
        with self.lock, np.errstate(all="ignore"):  # βᵗ vanishes in the end
            while len(self.scratch) < threads:
                self.scratch.append(Scratch([]))
            if self.plan is None or not self.plan.is_for(parts, threads):
                self.plan = Plan(parts, self.width, self.rule.config.rank, threads)
                self.frame = self._framed(self.plan)
            self.plan.aim(parts)
            try:
                yield self.plan
            finally:
                self.plan.release()
                if not self.plan.regular:
                    self.forget()

    def _framed(self, plan: Plan) -> Frame | None:
        """What whole steps in one call read, where they can be taken so."""
        rank = self.rule.config.rank
        if not (self.whole and at_once(plan, rank)):
            return None
        pieces = compile_directional(self.width, plan.batches[0].dtypes)[1]
        made = dict.fromkeys(("observe", "update", "move", "copy"), pieces)
        made["steer"] = compile_steering(self.architecture)[1]
        if plan.waves[0].matrices:
            made["orthogonalise"] = compile_orthogonal(rank, self.width)[1]
        code = {name: module.address(name) for name, module in made.items()}
        code["move"] = pieces.address(MOVES[plan.trails])
        return Frame(plan, code, self.network.ctypes.data)

    def _code(self, dtypes: Dtypes) -> Code:
        """Functions by name, for states of these types."""
        return compile_directional(self.width, dtypes)[0]

    def _run(self, name: str, plan: Plan, batch: Batch, thread: int) -> None:
        """Run code on a batch."""
        code = self._code(batch.dtypes)[name]
        if plan.regular:
            code(len(batch.pieces), plan.address(batch))
            return
        rows = plan.rows(batch).copy()
        pairs = columns(batch, self.scratch[thread])
        rows[:, GRAD : GRAD + 2] = [[grad.data_ptr(), param.data_ptr()] for grad, param in pairs]
        if name == "update" and isinstance(self.rule.context, WindowContext):
            for piece, (grad, _) in zip(batch.pieces, pairs, strict=True):
                window = piece.part.state.get("window")
                if window is not None:
                    theta = piece.part.theta[piece.where]
                    push(window[piece.where], self.rule.context.snapshot(theta, grad))
        code(len(rows), rows.ctypes.data)

    def _looked(self, plan: Plan) -> np.ndarray:
        """Σ|g| and the rule's sums, (parts, totals) float64."""
        plan.sums[:] = 0
        share(functools.partial(self._run, "observe", plan), plan.batches)
        return plan.total(TOTALS)

    def _advance(self, plan: Plan, length: np.ndarray, mixed: np.ndarray, steps: np.ndarray) -> None:
        """Advance parts, whose steering is (parts,) and (parts, 4), after so many steps."""
        rates = np.array(self._rates(plan, steps))
        plan.numbers[:, WEIGHTS] = mixed
        plan.sums[:, 0] = 0
        for wave in plan.waves:
            self._orthogonalise(plan, wave)
            share(functools.partial(self._run, "update", plan), wave.batches)
            squares = plan.total(1, wave.pieces)[:, 0]
            lengths = -length / np.maximum(np.sqrt(squares / plan.sizes), TINY)
            plan.numbers[wave.parts, LENGTH] = (lengths * rates)[wave.parts]
            share(functools.partial(self._move, plan, lengths), wave.batches)
        if plan.direct:
            tell(plan)

    def _move(self, plan: Plan, lengths: np.ndarray, batch: Batch, thread: int) -> None:
        """θ ← left · θ + length · d, or behind this."""
        if plan.direct:
            self._code(batch.dtypes)[MOVES[plan.trails]](len(batch.pieces), plan.address(batch))
            return
        for piece in batch.pieces:
            # Half precision is rounded once, at the end.
            delta = plan.direction(piece.index)[piece.where] * float(lengths[piece.index])
            state = rows(piece.part.state, piece.where)
            piece.part.move(piece.part.theta[piece.where], delta, torch.tensor(True, device="cpu"), state)

    def _orthogonalise(self, plan: Plan, wave: Wave) -> None:
        """Write the orthogonalised momentum of matrices where directions will be."""
        rank = self.rule.config.rank
        if rank > LARGEST_RANK:
            for index, matrix in wave.matrices:
                part = plan.parts[index]
                momentum = nesterov(part.gradient, part.state[MOMENTUM].float()).view(1, *matrix)
                with full_precision(momentum.device):
                    plan.direction(index).copy_(orthogonalise_each([momentum], rank)[0].reshape(-1))
        elif wave.matrices:
            kept = plan.aim_matrices(wave)
            code = compile_orthogonal(rank, self.width)[0]["orthogonalise"]

            def work(rows: np.ndarray, thread: int) -> None:
                rows[:, -1] = self.scratch[thread].room(plan.free).data_ptr()
                code(len(rows), rows.ctypes.data)

            share(work, wave.rows)
            del kept


def make_kernel(rule: DirectionalRule) -> DirectionalKernel | None:
    """The kernel of a rule on the CPU; None if it is not in float32."""
    return DirectionalKernel(rule) if all(p.dtype == torch.float32 for p in rule.parameters()) else None
