"""An LSTM for every coordinate, with shared weights: the papers' rules, and one that changes Adam's step."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from l2o_runtime.config import LATER, require
from l2o_runtime.contexts import make_context
from l2o_runtime.contexts.progress import Level, Progress
from l2o_runtime.rules.base import OUTPUTS, Rule, RuleConfig, Spec, silence
from l2o_runtime.rules.coordinate_lstm import CoordinateLSTM
from l2o_runtime.rules.features import FEATURE_SPECS, LOG_SIGN_P, WIDTHS, combine, features_of
from l2o_runtime.rules.restraint import restrain
from l2o_runtime.state import State


@dataclass(frozen=True, kw_only=True)
class CoordinateConfig(RuleConfig):
    """What all rules with an LSTM per coordinate have.

    Attributes:
        layers: of the LSTM.
    """

    layers: int = 2

    @property
    def inputs(self) -> int:
        """Numbers per coordinate that the LSTM is given, besides the context."""
        return WIDTHS[self.features]

    @property
    def network(self) -> str:
        """The network in a few words."""
        return f"{self.layers} × {self.hidden} LSTM per coordinate"

    @property
    def flops(self) -> int | None:
        """Floating-point operations of matrix products per coordinate and step, biases included.

        >>> LSTMConfig().flops
        10121
        """
        inputs = [self.inputs] + [self.hidden] * (self.layers - 1)
        layers = sum(2 * 4 * self.hidden * (size + self.hidden) + 4 * self.hidden for size in inputs)
        return layers + 2 * self.hidden + 1


@dataclass(frozen=True, kw_only=True)
class OutputConfig(CoordinateConfig):
    """What those have whose LSTM gives the step itself.

    Attributes:
        output: "linear" (Andrychowicz), or "tanh", which bounds every step by output_scale · lr.
    """

    output: Literal["linear", "tanh"] = "linear"

    @property
    def bounded(self) -> bool:
        """Whether steps are at most `output_scale` · lr."""
        return self.output == "tanh"


@dataclass(frozen=True, kw_only=True)
class LSTMConfig(OutputConfig):
    """The logarithm and the sign of a gradient through an LSTM (Andrychowicz et al. 2016).

    Attributes:
        p: gradients below e^−p are seen as they are, larger ones by their logarithms. It has a kernel for 10 alone.
    """

    kind: ClassVar[str] = "lstm"
    features: ClassVar[str] = "log_sign"
    p: float = field(default=LOG_SIGN_P, metadata=LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.p <= 80, f"p: must be in (0, 80], got {self.p}")


@dataclass(frozen=True, kw_only=True)
class PlainConfig(OutputConfig):
    """A gradient as it is through an LSTM, for synthetic problems (Andrychowicz et al. 2016, section 3.1)."""

    kind: ClassVar[str] = "plain"
    features: ClassVar[str] = "plain"


@dataclass(frozen=True, kw_only=True)
class NormalizedConfig(OutputConfig):
    """A gradient and its average, divided by the root of its mean square, through an LSTM (as in Lv et al. 2017).

    Attributes:
        noise_floor: a gradient smaller than this share of the root mean square of all gradients is taken for rounding,
            and where a gradient is gone steps fade (`l2o_runtime.rules.restraint`). None does neither.
    """

    kind: ClassVar[str] = "normalized"
    features: ClassVar[str] = "normalized"
    noise_floor: float | None = field(default=None, metadata=LATER)


@dataclass(frozen=True, kw_only=True)
class MomentsConfig(CoordinateConfig):
    """Averages over several spans, sizes of gradients and parameters, time and loss; the LSTM changes Adam's step.

    Attributes:
        noise_floor: as in `NormalizedConfig`.
    """

    kind: ClassVar[str] = "moments"
    features: ClassVar[str] = "moments"
    output_scale: float = 0.01
    noise_floor: float | None = field(default=None, metadata=LATER)


def usual(config: CoordinateConfig) -> bool:
    """Whether gradients are seen as the kernels have it: with p = 10, where there is a p."""
    return not isinstance(config, LSTMConfig) or config.p == LOG_SIGN_P


class LSTMRule(Rule):
    """Δ = scale · M(features(g), context, h; φ), the same LSTM for every coordinate.

    With the features `moments` the network's outputs combine Adam-like directions, and besides the context it sees the
    optimization's progress.

    Source: Andrychowicz et al. 2016, eq. 2; Šimánek et al., arXiv 2211.16268.
    """

    config: CoordinateConfig

    def __init__(self, config: CoordinateConfig):
        super().__init__()
        self.config = config
        # The cell is drawn before the context: rules that differ only in their context share its weights.
        self.combines = config.features == "moments"
        self.progress = Progress() if self.combines else None if config.noise_floor is None else Level()
        width = config.context.width + (self.progress.WIDTH if self.progress else 0)
        outputs = OUTPUTS if self.combines else 1
        self.cell = CoordinateLSTM(WIDTHS[config.features], width, config.hidden, config.layers, outputs)
        if self.combines:
            silence(self.cell.head)
        self.context = make_context(config.context)

    @property
    def spec(self) -> Spec:
        """What features, LSTM and context keep."""
        coordinate = FEATURE_SPECS[self.config.features] | self.cell.coordinate_spec | self.context.coordinate_spec
        return Spec(coordinate, {}, self.context.context_spec | (self.progress.context_spec if self.progress else {}))

    @property
    def observed(self) -> tuple[str, ...] | None:
        """As in `Rule`."""
        averages = ("m10", "v1000") if self.combines else ()
        return None if self.context.placed else (*averages, *self.context.coordinate_spec)

    def observe(self, param: Tensor, grad: Tensor, state: State, offset: int | Tensor = 0) -> Tensor:
        """Sums of the progress, if it is looked at, and of the context: (..., k)."""
        seen = self.context.observe(param, grad, state, offset)
        if not self.progress:
            return seen
        averages = (state["m10"], state["v1000"]) if self.combines else ()
        return torch.cat([self.progress.observe(grad, *averages), seen], dim=-1)

    def steer(self, sums: Tensor, shapes: Tensor | None, loss: Tensor, state: State) -> tuple[Tensor, State]:
        """The context (..., 1, c), after level and progress, if they are looked at."""
        total = sums.squeeze(-2)
        if not self.progress:
            context, new = self.context.read(total, loss, state)
            return context.unsqueeze(-2), new
        size = self.progress.SUMS
        own, others = total.split([size, total.shape[-1] - size], dim=-1)
        progress, progress_state = self.progress.read(own, loss, state)
        context, new = self.context.read(others, loss, state)
        return torch.cat([progress, context], dim=-1).unsqueeze(-2), new | progress_state

    def update(self, grad: Tensor, param: Tensor, steering: Tensor, state: State) -> tuple[Tensor, State]:
        """As in `Rule`."""
        remembered = self.context.remember(param, grad, state)
        context = steering.squeeze(-2)
        level, context = (context[..., :1], context[..., 1:]) if self.progress else (context[..., :0], context)
        known = {"p": self.config.p} if isinstance(self.config, LSTMConfig) else {}
        seen, feature_state = features_of(self.config.features, grad, param, level, state, **known)
        output, cell_state = self.cell(torch.stack(seen.features, dim=-1), context, state)
        if self.combines:
            delta = combine(output.unbind(-1), seen.directions)
        else:
            delta = output.squeeze(-1).tanh() if self.config.bounded else output.squeeze(-1)
        delta = self.config.output_scale * delta
        if self.config.noise_floor is not None:
            gradient, mean, root = seen.relative
            delta = restrain(delta, gradient, mean, root, self.config.noise_floor * level.exp())
        return delta, feature_state | cell_state | remembered
