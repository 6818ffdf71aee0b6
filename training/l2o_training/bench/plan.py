"""Who can run with whom: memory is estimated before anything large is made."""

import warnings
from dataclasses import dataclass

import torch

from l2o_runtime import HorizonWarning
from l2o_runtime.config import ConfigError
from l2o_training.bench.models import Shapes, count
from l2o_training.bench.racers import Racer
from l2o_training.bench.timing import COPY_BYTES, Gradients, open_lane, weigh

PILOT = (128, 256)
"""Rows of 256 of the two pilot models; both are larger than the runtime's chunk of coordinates."""

SHARED = 8
"""Bytes per parameter of the gradients and their copy."""

OWN = 4
"""Bytes per parameter of a racer's parameters."""


@dataclass(frozen=True)
class Line:
    """A straight line, fixed + slope · n."""

    fixed: float
    slope: float

    def at(self, n: int) -> int:
        """Its value, never below 0."""
        return round(max(self.fixed, 0.0) + max(self.slope, 0.0) * n)


@dataclass(frozen=True)
class Need:
    """Bytes of memory of a racer against the number of parameters: what it keeps, and what a step adds."""

    state: Line
    transient: Line


def line(points: list[tuple[int, int]]) -> Line:
    """The line through two points."""
    (x0, y0), (x1, y1) = points
    slope = (y1 - y0) / (x1 - x0)
    return Line(y0 - slope * x0, slope)


def pilot(racer: Racer, device: torch.device) -> Need:
    """Run a racer on two small models to learn what memory it takes.

    Raises:
        ConfigError: it cannot be made or cannot step.
    """
    states, transients = [], []
    for rows in PILOT:
        shapes: Shapes = [(rows, 256), (256,)]
        gradients = Gradients(shapes, device)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", HorizonWarning)
                lane = open_lane(racer, shapes, gradients, device)
                lane.step()
                weigh(lane, gradients, device, resident=False)
        except Exception as error:  # an optimizer of somebody else's may raise anything
            raise ConfigError(f"{racer.name}: cannot be timed: {type(error).__name__}: {error}") from error
        states.append((count(shapes), lane.state))
        transients.append((count(shapes), lane.allocated))
    return Need(line(states), line(transients))


def group_bytes(group: list[Racer], needs: dict[str, Need], n: int) -> int:
    """Memory that a race of these racers takes at its highest: all states, one step, gradients, probes."""
    kept = sum(needs[c.name].state.at(n) + OWN * n for c in group)
    return kept + max(needs[c.name].transient.at(n) for c in group) + SHARED * n + 2 * min(320 * n, COPY_BYTES)


def largest(group: list[Racer], needs: dict[str, Need], available: int) -> int:
    """Most parameters for which a group fits, by bisection."""
    low, high = 0, 2**40
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if group_bytes(group, needs, middle) <= available else (low, middle)
    return low


def plan(
    racers: list[Racer], needs: dict[str, Need], n: int, available: int
) -> tuple[list[list[Racer]], dict[str, str]]:
    """Split racers into groups that fit into memory, each beside its references.

    References that do not fit are left out from the last to the second; without the first there is no race, for no
    figure is given without its comparison.

    Args:
        racers: references before those that name them.
        needs: by name.
        n: number of parameters.
        available: bytes.

    Returns:
        Groups, and for those left out the reason by name.
    """
    by_name = {racer.name: racer for racer in racers}
    groups: list[list[Racer]] = []
    skipped: dict[str, str] = {}
    for racer in racers:
        teams = [
            [*(by_name[name] for name in racer.references[:kept]), racer]
            for kept in range(len(racer.references), min(len(racer.references), 1) - 1, -1)
        ]
        team = next((team for team in teams if group_bytes(team, needs, n) <= available), None)
        if team is None:
            skipped[racer.name] = _reason(teams[-1], needs, n, available)
            continue
        for group in groups:
            joined = [c for c in racers if c in group or c in team]
            if group_bytes(joined, needs, n) <= available:
                group[:] = joined
                break
        else:
            groups.append(team)
    return groups, skipped


def _reason(team: list[Racer], needs: dict[str, Need], n: int, available: int) -> str:
    state = needs[team[-1].name].state.at(n)
    return (
        f"needs {group_bytes(team, needs, n) / 1e9:.1f} GB ({state / n:.0f} bytes of state per parameter), "
        f"{available / 1e9:.1f} GB may be used; up to {largest(team, needs, available) / 1e6:.3g} M parameters fit"
    )
