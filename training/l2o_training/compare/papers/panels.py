"""What Open-L2O publishes on sparse recovery, panel by panel, and the overrides that make a preset for a panel."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

from l2o_runtime.config import nearest, require, to_dict
from l2o_training.tasks import SparseConfig

CLEAN = SparseConfig(name="sparse-256-512", rows=256, columns=512)


@dataclass(frozen=True)
class Panel:
    """Signals of one kind, and what is published of solvers on them.

    Attributes:
        title: in a few words.
        task: the signals.
        published: preset → NMSE in dB after 8 and after 16 layers, read off Figure 5 of arXiv 2103.12828 (± 0.5 dB);
            None where the figure was not read.
    """

    title: str
    task: SparseConfig
    published: Mapping[str, tuple[float | None, float]]

    @property
    def overrides(self) -> tuple[str, ...]:
        """What makes a preset, which is meant for signals without noise, one for these."""
        if self.task == CLEAN:
            return ()
        changed = {key: value for key, value in to_dict(self.task).items() if value is not None}
        task = ", ".join(f"{key} = {json.dumps(value)}" for key, value in changed.items())
        sizes = [(key, getattr(self.task, key)) for key in ("rows", "columns")]
        return (f"tasks=[{{{task}}}]", *(f"rule.{key}={size}" for key, size in sizes if size != getattr(CLEAN, key)))


PANELS = {
    "": Panel(
        "without noise",
        CLEAN,
        {
            "lista": (-16.8, -35.3),
            "lista-cp": (-22.1, -30.3),
            "lista-cpss": (-34.0, -63.1),
            "alista": (-28.0, -78.5),
            "lamp": (-31.9, -54.6),
            "glista": (-28.7, -55.6),
            "lfista": (-12.1, -28.9),
        },
    ),
    "-snr-20": Panel(
        "SNR 20",
        replace(CLEAN, name="sparse-snr-20", snr=20.0),
        {
            "lista": (-12.0, -18.3),
            "lista-cp": (-14.7, -14.7),
            "lista-cpss": (-18.9, -20.1),
            "alista": (-20.0, -20.0),
            "lamp": (-16.1, -16.2),
            "glista": (-15.4, -22.1),
            "lfista": (-9.5, -17.0),
        },
    ),
    "-coherent": Panel(
        "coherent A, neighbours 0.9",
        replace(CLEAN, name="sparse-coherent", correlation=0.9),
        {
            "lista": (None, -13.6),
            "lista-cp": (None, -19.3),
            "lista-cpss": (None, -26.5),
            "alista": (None, -13.9),
            "lamp": (None, -24.2),
            "glista": (None, -31.2),
            "lfista": (None, -15.2),
        },
    ),
    "-512-1024": Panel(
        "A of 512 × 1024",
        replace(CLEAN, name="sparse-512-1024", rows=512, columns=1024),
        {
            "lista-cp": (-17.5, -25.2),
            "lista-cpss": (None, -29.8),
            "alista": (-34.5, -81.2),
            "lamp": (-31.2, -53.2),
            "glista": (-22.0, -26.3),
        },
    ),
}
"""What a preset's name ends in → the panel.

LISTA and LFISTA of 512 × 1024 have more numbers than a file may have. How the published coherent A was drawn is not
known here: in its place stands one whose neighbouring columns have inner products of about 0.9. (At 0.5 ALISTA recovers
as it does from independent columns.)
"""

LASSO = {"lista-lasso": 2e-2, "alista-lasso": 8.5e-3}
"""Preset → E[f − f*]/E[f*] at 16 layers for A of 25 × 50, read off Figure 6 (± 10 %)."""

ITERATIONS = {"AMP": 25, "FISTA": 202, "ISTA": 3420}
"""Iterations to −35 dB that the authors of ALISTA report."""


@dataclass(frozen=True)
class Variant:
    """A preset, for a panel.

    Attributes:
        preset: its name.
        overrides: of its keys.
    """

    preset: str
    overrides: tuple[str, ...] = ()


VARIANTS = {
    **{
        f"{preset}{end}": Variant(preset, panel.overrides)
        for end, panel in PANELS.items()
        for preset in panel.published
    },
    **{preset: Variant(preset) for preset in LASSO},
}
"""All that the page is about, by name."""


def find_variant(name: str) -> Variant:
    """A variant by name.

    Raises:
        ConfigError: there is none.
    """
    require(name in VARIANTS, f"--only: unknown variant {name!r}: {nearest(name, list(VARIANTS))}")
    return VARIANTS[name]
