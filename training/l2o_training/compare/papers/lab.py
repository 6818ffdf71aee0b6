"""Where a plan's runs and losses are, and its comparisons as studies."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from l2o_runtime.files.artifact import find_rule
from l2o_training.compare.baselines import BASELINES
from l2o_training.compare.contenders import Contender, name_of, of_baseline, of_rule
from l2o_training.compare.flat import FlatWorkload
from l2o_training.compare.papers.plans import Experiment
from l2o_training.compare.papers.variants import Variant
from l2o_training.compare.study import Study
from l2o_training.meta.folder import RULE
from l2o_training.tasks import TaskConfig
from l2o_training.tasks.data import Datasets

TOGETHER = 5
"""Runs advanced together: ten of them are those of `l2o eval --runs 5` with seeds 0 and 1."""


@dataclass(frozen=True)
class Lab:
    """Where everything is.

    Attributes:
        runs: folder of the runs, and of the result cache.
        data_root, download: where data sets are, and whether torchvision may fetch them.
        changes: overrides on top of every variant's own.
    """

    runs: Path
    data_root: Path
    download: bool = False
    changes: tuple[str, ...] = ()
    _workloads: dict[TaskConfig, FlatWorkload] = field(default_factory=dict)

    @cached_property
    def load(self) -> Datasets:
        """Gives the data set of a name."""
        return Datasets(self.data_root, download=self.download)

    def workload(self, config: TaskConfig) -> FlatWorkload:
        """A task, built once."""
        if config not in self._workloads:
            self._workloads[config] = FlatWorkload(config, self.load, together=TOGETHER)
        return self._workloads[config]

    def folder(self, variant: Variant, seed: int) -> Path:
        """Folder of a run."""
        return self.runs / f"{variant.name}-s{seed}"

    def rule(self, variant: Variant, seed: int) -> Path:
        """File of the rule of a run."""
        return self.folder(variant, seed) / RULE

    def study(self, experiment: Experiment) -> Study:
        """An experiment as a study of the rules that exist already, and of Adam."""
        return Study(
            suite=experiment.name,
            workloads=[self.workload(task) for task in experiment.tasks],
            contenders=contenders(self, experiment),
            steps=experiment.steps,
            runs=experiment.runs,
            cache=self.runs / "cache",
        )


def contenders(lab: Lab, experiment: Experiment) -> list[Contender]:
    """Trained rules that exist, rules taken as they are, and Adam at the experiment's learning rates."""
    adam = replace(of_baseline(BASELINES["adam"]), lrs=experiment.lrs)
    rules = [of_rule(name, path) for name, path in rules_of(lab, experiment).items() if path.is_file()]
    return [*rules, *([adam] if experiment.lrs else [])]


def rules_of(lab: Lab, experiment: Experiment) -> dict[str, Path]:
    """Name and file of all rules of an experiment, whether they exist already or not.

    Raises:
        ArtifactError: one that is taken as it is does not exist.
    """
    runs = [(variant, seed) for variant in experiment.variants for seed in range(experiment.seeds)]
    trained = {lab.folder(variant, seed).name: lab.rule(variant, seed) for variant, seed in runs}
    return trained | {bundled(rule): find_rule(rule) for rule in experiment.rules}


def bundled(rule: str) -> str:
    """What pages call a rule that is taken as it is."""
    return name_of(find_rule(rule))
