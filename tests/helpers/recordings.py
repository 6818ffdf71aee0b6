"""Gradients that do not depend on parameters, for programs in other languages: what they are fed, what Python does."""

from pathlib import Path

import torch
from golden.test_golden import check_trajectory
from golden.trajectories import RULES, STEPS, Trajectory, distances, make_model, train

from l2o_export.verify import FREE_TOLERANCE
from l2o_runtime import LearnedOptimizer


def recording(steps=STEPS, **changes):
    """The model `fed` of the golden trajectories: parameters, gradients and losses of every step, and options.

    Tensors are (16,), (4, 2, 3, 3), (15, 16) and (), in this order.
    """
    model = make_model("fed")
    return {
        "params": [param.detach().clone() for param in model.parameters()],
        "grads": [getattr(model, f"grad_{name}")[:steps].float() for name in model.weights],
        "losses": model.losses[:steps].float(),
        "options": torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64),  # lr, weight decay, steps in all or 0
        "stop": -1,  # the step before which the state is saved, and another optimizer goes on
        "told": True,  # whether the optimizer gets the losses
    } | changes


def check_steps(found: Trajectory, rule: str, file: str | Path):
    """Parameters after every step are those that were recorded; of younger rules, those of Python with the same file.

    Not those of the plain loop: on this problem, whose matrix has gradients of nine orders of magnitude, ONNX's
    elementary operations lead `directional` elsewhere (docs/howto/deploy.md).
    """
    if rule in RULES:
        check_trajectory(found, f"{rule}/fed", FREE_TOLERANCE)
    else:
        error = distances(train(file, "fed", compiled=False), found).max()
        assert error <= FREE_TOLERANCE


def eager(rule, content, **options):
    """The same steps by `LearnedOptimizer`: parameters after each (steps, n), and its counters."""
    params = [torch.nn.Parameter(param.clone()) for param in content["params"]]
    optimizer, seen = LearnedOptimizer(params, rule=rule, **options), []
    for step, loss in enumerate(content["losses"]):
        for param, grads in zip(params, content["grads"], strict=True):
            param.grad = grads[step].clone()
        optimizer.step(loss=loss)
        seen.append(torch.cat([param.detach().flatten() for param in params]))
    return torch.stack(seen), optimizer.health()


def with_bad_numbers(content):
    """A recording of ten steps or more in which four are not to be taken."""
    content["grads"][0][3, 0] = float("nan")
    content["grads"][2][5, 0, 0] = float("inf")
    content["losses"][7] = float("inf")
    for grads in content["grads"]:
        grads[9] = 0
    return content
