"""Image data sets as tensors: torchvision's, scikit-learn's digits, and `.npz` files of one's own."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from l2o_runtime.config import nearest

TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}
DATASETS = ["digits", *TORCHVISION]


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


def load_dataset(name: str, root: str | Path = "data", *, download: bool = False) -> Dataset:
    """The training split of a data set.

    Args:
        name: "digits" (ships with scikit-learn), "mnist", "fashion-mnist", "cifar10" (torchvision's files under
            `root`, or `cifar10.npz`), or a `.npz` file with x_train and y_train, looked up under `root` too.
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
    if name not in TORCHVISION:
        raise DataError(f"unknown data set {name!r}: {nearest(name, DATASETS)}, or a .npz file")
    if (root / f"{name}.npz").is_file():
        return read_npz(root / f"{name}.npz")
    return _load_torchvision(name, root, download)


class Datasets:
    """The data sets of one folder, each read once.

    Args:
        root, download: as `load_dataset` takes them.
    """

    def __init__(self, root: str | Path, *, download: bool = False):
        self.root, self.download = root, download
        self._read: dict[str, Dataset] = {}

    def __call__(self, name: str) -> Dataset:
        """The data set of a name.

        Raises:
            DataError: it is missing.
        """
        if name not in self._read:
            self._read[name] = load_dataset(name, self.root, download=self.download)
        return self._read[name]


def _load_torchvision(name: str, root: Path, download: bool) -> Dataset:
    from torchvision import datasets

    try:
        data = getattr(datasets, TORCHVISION[name])(root, train=True, download=download)
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


def read_npz(path: Path) -> Dataset:
    """A `.npz` file with x_train (N, h, w), (N, h, w, c) or (N, features) and y_train (N,).

    uint8 images are taken as 0 … 255, floating ones as they are.

    Raises:
        DataError: unreadable, keys missing, or shapes that do not fit.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            missing = {"x_train", "y_train"} - set(archive.files)
            if missing:
                raise DataError(f"{path}: lacks {', '.join(sorted(missing))}; it has {', '.join(archive.files)}")
            x, y = archive["x_train"], archive["y_train"]
    except DataError:
        raise
    except Exception as error:  # damaged files raise whatever numpy, zipfile and zlib trip over
        raise DataError(f"{path}: not a readable .npz file ({error})") from None
    y = y.reshape(-1) if y.ndim == 2 and y.shape[1] == 1 else y
    if x.ndim not in (2, 3, 4) or y.ndim != 1 or len(x) != len(y) or len(x) == 0:
        raise DataError(
            f"{path}: x_train is {x.shape}, y_train is {y.shape}; expected (N, h, w[, c]) or (N, features) and (N,)"
        )
    if not np.issubdtype(y.dtype, np.integer) or y.min() < 0:
        raise DataError(f"{path}: y_train must be integers from 0 on, got {y.dtype} from {y.min()}")
    if x.dtype != np.uint8 and not np.issubdtype(x.dtype, np.floating):
        raise DataError(f"{path}: x_train must be uint8 in 0 … 255 or floating, got {x.dtype}")
    images = torch.from_numpy(x if x.dtype == np.uint8 else x.astype(np.float32))
    if images.dim() == 2:
        images = images[:, None, None, :]
    else:
        images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
    return Dataset(images, torch.from_numpy(y.astype(np.int64)), int(y.max()) + 1)
