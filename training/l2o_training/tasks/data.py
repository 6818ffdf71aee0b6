"""Image data sets as tensors: torchvision's, scikit-learn's digits, and `.npz` files of one's own.

Texts and tables are those of `l2o_training.tasks.records`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from l2o_runtime.config import nearest

if TYPE_CHECKING:
    from l2o_training.tasks.records import Table

TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}
DATASETS = ["digits", *TORCHVISION]
TEST = "-test"
"""What the names of torchvision's test splits end with."""


class DataError(ValueError):
    """A data set is missing, damaged or of the wrong shape."""


@dataclass(frozen=True)
class Dataset:
    """Images and labels of a training split.

    Attributes:
        images: (N, channels, height, width), uint8 in 0 … 255 or float32; scaled to [0, 1] batch by batch.
        labels: (N,) int64.
        classes: number of classes.
        gain, shift: batches have gain · image + shift instead.
    """

    images: Tensor
    labels: Tensor
    classes: int
    gain: float = 1.0
    shift: float = 0.0

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images (*index, c, h, w) as float32, in [0, 1] before gain and shift, and labels (*index)."""
        images = self.images[index]
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        changed = (self.gain, self.shift) != (1.0, 0.0)
        return self.gain * images + self.shift if changed else images, self.labels[index]

    def to(self, device: torch.device) -> "Dataset":
        """The same data on another device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


Load = Callable[[str], Dataset]
"""Gives the data set of a name."""


def load_dataset(name: str, root: str | Path = "data", *, download: bool = False) -> Dataset:
    """The training split of a data set, or the test split of one of torchvision's.

    Args:
        name: "digits" (ships with scikit-learn), "mnist", "fashion-mnist", "cifar10" (torchvision's files under
            `root`, or `cifar10.npz`), with "-test" behind it their test splits, or a `.npz` file with x_train and
            y_train, looked up under `root` too.
        root: the folder with the data.
        download: let torchvision fetch what is missing.

    Raises:
        DataError: unknown, missing or malformed data; the message names the folder looked in.
    """
    root = Path(root)
    if name == "digits":
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        scaled = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)
        return Dataset(scaled, torch.tensor(labels, dtype=torch.int64), 10)
    if name.endswith(".npz"):
        candidates = [path for path in (root / name, Path(name)) if path.is_file()]
        if not candidates:
            raise DataError(f"no data file {name}: looked in {root.absolute()} and {Path.cwd()}")
        return read_npz(candidates[0])
    base, split = name.removesuffix(TEST), "test" if name.endswith(TEST) else "train"
    if base not in TORCHVISION:
        raise DataError(f"unknown data set {name!r}: {nearest(name, DATASETS)}, or a .npz file")
    if (root / f"{base}.npz").is_file():
        return read_npz(root / f"{base}.npz", split)
    return _load_torchvision(base, root, download, split)


class Datasets:
    """The data sets of one folder, each read once.

    Args:
        root, download: as `load_dataset` takes them.
    """

    def __init__(self, root: str | Path, *, download: bool = False):
        self.root, self.download = root, download
        self._read: dict[str, Dataset] = {}
        self._texts: dict[str, str] = {}
        self._tables: dict[str, Table] = {}

    def __call__(self, name: str) -> Dataset:
        """The data set of a name.

        Raises:
            DataError: it is missing.
        """
        if name not in self._read:
            self._read[name] = load_dataset(name, self.root, download=self.download)
        return self._read[name]

    def text(self, name: str) -> str:
        """The text of a name.

        Raises:
            DataError: it is missing.
        """
        from l2o_training.tasks.records import load_text

        if name not in self._texts:
            self._texts[name] = load_text(name, Path(self.root))
        return self._texts[name]

    def table(self, name: str) -> "Table":
        """The table of a name.

        Raises:
            DataError: it is missing.
        """
        from l2o_training.tasks.records import load_table

        if name not in self._tables:
            self._tables[name] = load_table(name, Path(self.root))
        return self._tables[name]

    def prepare(self, name: str) -> None:
        """Read a data set of any kind.

        Raises:
            DataError: it is missing.
        """
        from l2o_training.tasks.records import TABLES, TEXTS

        read = self.text if name in TEXTS else self.table if name in TABLES else self
        read(name)


def _load_torchvision(name: str, root: Path, download: bool, split: str) -> Dataset:
    from torchvision import datasets

    try:
        data = getattr(datasets, TORCHVISION[name])(root, train=split == "train", download=download)
    except Exception as error:  # damaged files raise whatever their readers trip over
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"no usable {name} under {root.absolute()} ({why}): "
            "point --data-root at a folder that has it, or remove what is damaged and add --download"
        ) from None
    images = torch.as_tensor(data.data)
    images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
    labels = torch.as_tensor(data.targets, dtype=torch.int64)
    if (
        images.dim() != 4
        or len(images) != len(labels)
        or len(labels) == 0
        or not 0 <= labels.min() <= labels.max() < 10
    ):
        raise DataError(f"{name} under {root.absolute()} is damaged: remove it and add --download")
    return Dataset(images, labels, 10)


def read_npz(path: Path, split: str = "train") -> Dataset:
    """A `.npz` file with x_train (N, h, w), (N, h, w, c) or (N, features) and y_train (N,); or x_test and y_test.

    uint8 images are taken as 0 … 255, floating ones as they are; labels are 0 … classes − 1, each of which occurs.

    Raises:
        DataError: unreadable, or not this; the message names the array, and how to mend it.
    """
    x, y = f"x_{split}", f"y_{split}"
    arrays = _read_arrays(path, (x, y))
    try:
        images, labels = _images(arrays[x]), _labels(arrays[y])
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    if len(images) != len(labels):
        raise DataError(f"{path}: x_train has {len(images)} rows, y_train {len(labels)}; each row needs its label")
    return Dataset(images, labels, int(labels.max()) + 1)


def _read_arrays(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Arrays of a `.npz` file; no code of it is run."""
    found: dict[str, np.ndarray] = {}
    name = ""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            missing = [name for name in names if name not in archive.files]
            if missing:
                raise DataError(f"{path}: lacks {', '.join(missing)}; it has {', '.join(archive.files)}")
            for name in names:
                found[name] = archive[name]
    except DataError:
        raise
    except Exception as error:  # damaged files raise whatever numpy, zipfile and zlib trip over
        if "allow_pickle" in str(error):
            raise DataError(
                f"{path}: {names[len(found)]} holds Python objects (dtype object), which are not read, as they may "
                "hold code: save an array of numbers, such as np.asarray(values, dtype='float32')"
            ) from None
        raise DataError(f"{path}: not a readable .npz file, as np.savez writes it ({error})") from None
    return found


def _images(x: np.ndarray) -> Tensor:
    """(N, c, h, w) from what a file has."""
    if x.ndim not in (2, 3, 4) or x.size == 0:
        raise DataError(f"x_train is {x.shape}; expected (N, features), (N, h, w) or (N, h, w, c), and none of them 0")
    if x.ndim == 4 and x.shape[1] in (1, 3) and x.shape[3] > 4:
        raise DataError(f"x_train is {x.shape}; channels come last: give x.transpose(0, 2, 3, 1)")
    if x.dtype != np.uint8 and not np.issubdtype(x.dtype, np.floating):
        raise DataError(f"x_train must be uint8 in 0 … 255 or floating, got {x.dtype}: give x.astype('float32')")
    if x.dtype != np.uint8:
        with np.errstate(over="ignore"):
            x = x.astype(np.float32)
        bad = np.argwhere(~np.isfinite(x))
        if len(bad):
            where = ", ".join(map(str, bad[0]))
            raise DataError(
                f"x_train has {len(bad)} of {x.size} values that are no finite float32 (NaN or infinity), "
                f"the first at [{where}]: leave these rows out, or fill them in"
            )
    images = torch.from_numpy(x)
    if images.dim() == 2:
        return images[:, None, None, :]
    return images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()


def _labels(y: np.ndarray) -> Tensor:
    """(N,) from what a file has."""
    y = y.reshape(-1) if y.ndim == 2 and y.shape[1] == 1 else y
    renumber = "np.unique(y, return_inverse=True)[1] numbers the classes"
    if y.ndim != 1 or y.size == 0:
        raise DataError(f"y_train is {y.shape}; expected (N,), a class for each row (from one-hot rows: y.argmax(1))")
    if not np.issubdtype(y.dtype, np.integer):
        raise DataError(f"y_train must be integers from 0 on, got {y.dtype}: {renumber}")
    classes = np.unique(y)
    if len(classes) < 2 or classes[0] != 0 or classes[-1] != len(classes) - 1:
        raise DataError(
            f"y_train must have 2 classes or more, 0 … classes − 1, each of which occurs; "
            f"got {len(classes)}, from {classes[0]} to {classes[-1]}: {renumber}"
        )
    return torch.from_numpy(y.astype(np.int64))
