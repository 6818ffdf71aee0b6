"""Measure what is missing of a study: several processes share it through the cache's folder, ranks by turns."""

import functools
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from l2o_training.compare.cache import write_result
from l2o_training.compare.sharing import POLL, Job, Report, share
from l2o_training.compare.study import Study, Trial, measure_times, measure_trial, read_times, read_trial
from l2o_training.compare.workloads import TimedWorkload
from l2o_training.ranks.group import ALONE, Ranks


@dataclass(frozen=True)
class Piece:
    """One file of the cache.

    Attributes:
        name, detail: what reports say of it.
        place: gives its path and key.
        done: whether it is there.
        work: gives its content.
    """

    name: str
    detail: str
    place: Callable[[], tuple[Path, dict[str, Any]]]
    done: Callable[[], bool]
    work: Callable[[], dict[str, Any]]

    def keep(self, content: dict[str, Any]) -> None:
        """Write what was measured."""
        write_result(*self.place(), {**content, "torch": torch.__version__})


def measure(
    study: Study,
    report: Report = lambda what, detail, done, total: None,
    *,
    poll: float = POLL,
    ranks: Ranks = ALONE,
) -> None:
    """Measure all that is missing; other processes with the same study share the work.

    Args:
        study: what.
        report: called before every measurement.
        poll: seconds between looks at what other processes do.
        ranks: who takes turns instead; rank 0 keeps the cache, and their number does not show in it.

    Raises:
        DataError: data is missing; told before anything is measured.
    """

    def prepare() -> None:
        for workload in study.workloads:
            workload.prepare()

    ranks.agree(prepare)
    if ranks.size > 1:
        _take_turns([piece for _, group in pieces(study) for piece in group], report, ranks)
        return
    share([_job(folder, group) for folder, group in pieces(study)], report, poll)


def pieces(study: Study) -> Iterator[tuple[Path, list[Piece]]]:
    """All measurements in the order in which they are made, by their folders."""
    for workload in study.workloads:
        if isinstance(workload, TimedWorkload):
            place = functools.partial(study.times_place, workload)
            done = functools.partial(_there, read_times, study, workload)
            work = functools.partial(measure_times, study, workload)
            yield place()[0].parent, [Piece(workload.name, "times", place, done, work)]
    for horizon, workload, contender in itertools.product(study.horizons, study.workloads, study.contenders):
        trials = study.trials(workload, contender, horizon)
        yield study.folder(workload, contender), [_piece(study, trial) for trial in trials]


def _piece(study: Study, trial: Trial) -> Piece:
    name = f"{trial.workload.name}: {trial.contender.name}"
    detail = f"lr {trial.lr:g}, {trial.steps} steps, seed {trial.group.seed}"
    place, done = functools.partial(study.place, trial), functools.partial(_there, read_trial, study, trial)
    return Piece(name, detail, place, done, functools.partial(measure_trial, trial))


def _there(read: Callable[..., object], *arguments: object) -> bool:
    return read(*arguments) is not None


def _job(folder: Path, group: list[Piece]) -> Job:
    def work(report: Report) -> None:
        missing = [piece for piece in group if not piece.done()]
        for index, piece in enumerate(missing):
            report(piece.name, piece.detail, index, len(missing))
            piece.keep(piece.work())

    return Job(group[0].name, folder, lambda: all(piece.done() for piece in group), work)


def _take_turns(every: list[Piece], report: Report, ranks: Ranks) -> None:
    """Every rank measures a piece, then rank 0 writes them; and so on."""
    own = [index for index, piece in enumerate(every) if not piece.done()] if ranks.main else []
    missing = json.loads(ranks.exchange(json.dumps(own))[0])
    for start in range(0, len(missing), ranks.size):
        turn = [every[index] for index in missing[start : start + ranks.size]]
        mine = turn[ranks.rank] if ranks.rank < len(turn) else None
        if mine is not None:
            report(mine.name, mine.detail, start, len(missing))
        said = ranks.exchange("" if mine is None else json.dumps(mine.work()))
        if ranks.main:
            for piece, text in zip(turn, said, strict=False):
                piece.keep(json.loads(text))
