"""The straightforward implementation of a learned optimizer: torch.nn.LSTMCell over all coordinates at once."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from l2o_runtime.rules import LSTMRule, Rule
from l2o_runtime.rules.features import log_sign


class PlainLSTM(Optimizer):
    """A rule without context, with `log_sign` features, as everyone writes it first; what the runtime is measured by.

    Args:
        params: as for any torch optimizer.
        rule: whose weights are taken.
        lr: factor on the learned step.

    Raises:
        ValueError: the rule has a context, or other features.
    """

    def __init__(self, params: Iterable[Tensor], rule: Rule, lr: float = 1.0):
        config = rule.config
        if not isinstance(rule, LSTMRule) or config.context.kind != "none" or config.kind != "lstm" or config.bounded:
            raise ValueError("PlainLSTM takes a rule without context, with log_sign features and linear output")
        super().__init__(params, {"lr": lr})
        self._hidden, self._scale = config.hidden, config.output_scale
        device = self.param_groups[0]["params"][0].device
        self._cells = [cell.to(device) for cell in _cells(rule)]
        self._head = nn.Linear(config.hidden, 1, device=device)
        self._head.load_state_dict(rule.cell.head.state_dict())

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Perform one step, all parameters together."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        (group,) = self.param_groups
        params = [param for param in group["params"] if param.grad is not None]
        grad = torch.cat([param.grad.flatten() for param in params])
        state = self.state[params[0]]
        x = torch.stack(log_sign(grad).features, dim=-1)
        for layer, cell in enumerate(self._cells):
            if f"h{layer}" not in state:
                for key in "hc":
                    state[f"{key}{layer}"] = grad.new_zeros(len(grad), self._hidden)
            x, state[f"c{layer}"] = cell(x, (state[f"h{layer}"], state[f"c{layer}"]))
            state[f"h{layer}"] = x
        delta = self._scale * self._head(x).squeeze(-1)
        for param, move in zip(params, delta.split([param.numel() for param in params]), strict=True):
            param.add_(move.view_as(param), alpha=group["lr"])
        return loss


def _cells(rule: LSTMRule) -> list[nn.LSTMCell]:
    """The rule's layers as torch's cells, which have two biases where ours have one."""
    cells = []
    for ih, hh, bias in zip(rule.cell.weight_ih, rule.cell.weight_hh, rule.cell.bias, strict=True):
        cell = nn.LSTMCell(ih.shape[1], hh.shape[1])
        weights = {"weight_ih": ih, "weight_hh": hh, "bias_ih": bias, "bias_hh": torch.zeros_like(bias)}
        cell.load_state_dict(weights)
        cells.append(cell)
    return cells
