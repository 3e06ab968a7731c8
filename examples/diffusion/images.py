"""Labeled images from files, and the noised samples that a training reads."""

from __future__ import annotations

import gzip
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from examples.diffusion.flow import noised
from megatron_dynmoe.settings.messages.refusals import FlagError

FASHION_MNIST = "/usr/share/datasets/fashion-mnist"
FASHION = [
    *("top", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "boot"),
]
SUFFIXES = (".png", ".jpg", ".jpeg")
# Pillow's modes of 8 bits for each color; the others would be cut off at 255 in silence.
GRAY, COLOR = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
CHANNELS = (1, 3)
FEWEST = 4  # images: two to learn from and two to hold out, which is what a covariance needs
_ABOUT = "docs/diffusion.md says what images have to be"
_SOURCES = (
    f"for Fashion-MNIST, sudo apt-get install dataset-fashion-mnist and give {FASHION_MNIST}; or "
    "give digits (needs scikit-learn), an .npz file with images [N, H, W] or [N, H, W, C] and "
    "labels [N], or a folder with a folder of PNG or JPEG files for each class"
)
# What the readers of files raise.
_UNREADABLE = (
    *(OSError, ValueError, KeyError, ImportError, EOFError),
    *(zipfile.BadZipFile, zlib.error),
)


class Images(NamedTuple):
    """Images of one size with labels.

    Attributes:
        pixels: [N, C, H, W] uint8.
        labels: [N] int64, from 0.
        names: of the classes.
    """

    pixels: Tensor
    labels: Tensor
    names: list[str]


@lru_cache(maxsize=1)
def load(source: str) -> Images:
    """Read ``--images``: ``digits``, a folder or an ``.npz`` file.

    - ``digits``: the 1,797 digits of 8 x 8 pixels that come with scikit-learn.
    - a folder with files of MNIST's format, such as those of Debian's dataset-fashion-mnist.
    - a folder with one folder of PNG or JPEG files for each class, all of one size, with 8 bits for
      each color. All become gray or, if one of them has colors, RGB; what is transparent is white.
    - an ``.npz`` file with ``images`` [N, H, W] or [N, H, W, C], uint8, gray or RGB, and ``labels``
      [N], which number the classes from 0.

    Raises:
        FlagError: there are no such images; the message says what was looked for.
    """
    path = Path(source)
    try:
        if source == "digits":
            pixels_NHWC, labels, names = _digits()
        elif path.suffix == ".npz":
            with np.load(path) as arrays:
                pixels_NHWC, labels = arrays["images"], arrays["labels"]
            names = None
        elif path.is_dir() and list(path.glob("*-images-idx3-ubyte.gz")):
            pixels_NHWC, labels, names = _idx(path)
        else:
            pixels_NHWC, labels, names = _folders(path)
        images = _checked(np.asarray(pixels_NHWC), np.asarray(labels), names)
    except _UNREADABLE as error:
        remedy = _ABOUT if path.exists() else _SOURCES
        raise FlagError("images", source, f": {error}", remedy) from None
    return images


def _checked(pixels: np.ndarray, labels: np.ndarray, names: list[str] | None) -> Images:
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] not in CHANNELS:
        raise ValueError(
            f"images are {pixels.dtype} {list(pixels.shape)}, not uint8 [N, H, W, C] with C = 1 "
            "(gray) or 3 (RGB)"
        )
    if len(pixels) < FEWEST:
        raise ValueError(f"there are {len(pixels)} images, and {FEWEST} are the fewest")
    if labels.shape != (len(pixels),) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels are {labels.dtype} {list(labels.shape)} of {len(pixels)} images")
    classes = np.unique(labels)
    if not np.array_equal(classes, np.arange(len(classes))):
        raise ValueError(
            f"labels are of {len(classes)} classes from {classes[0]} to {classes[-1]}, not "
            "numbered 0, 1, 2 and so on"
        )
    names = names or [str(number) for number in range(len(classes))]
    channels_first = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    return Images(torch.from_numpy(channels_first), torch.from_numpy(labels.astype("int64")), names)


def _digits() -> tuple[np.ndarray, np.ndarray, None]:
    from sklearn.datasets import load_digits  # of the tests' extra; no one else needs it

    digits = load_digits()
    return (digits.images * (255 / 16)).astype(np.uint8), digits.target, None


def _idx(folder: Path) -> tuple[np.ndarray, np.ndarray, list[str] | None]:
    """MNIST's files: a header of big-endian 32-bit numbers, then bytes."""
    pixels, labels = [], []
    for path in sorted(folder.glob("*-images-idx3-ubyte.gz"), reverse=True):  # train, then t10k
        content = gzip.decompress(path.read_bytes())
        shape = np.frombuffer(content, ">u4", 4)[1:]
        pixels.append(np.frombuffer(content, np.uint8, offset=16).reshape(shape))
        name = path.name.replace("images-idx3", "labels-idx1")
        content = gzip.decompress(path.with_name(name).read_bytes())
        labels.append(np.frombuffer(content, np.uint8, offset=8))
    names = FASHION if "fashion" in folder.name else None
    return np.concatenate(pixels), np.concatenate(labels), names


def _folders(folder: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    if not classes:
        raise ValueError("it holds no folders, of which each would be a class")
    arrays, labels = [], []
    for label, each in enumerate(classes):
        files = sorted(path for path in each.iterdir() if path.suffix.lower() in SUFFIXES)
        if not files:
            raise ValueError(f"{each} holds no PNG or JPEG files")
        for path in files:
            arrays.append(_pixels(path))
            labels.append(label)
            if arrays[-1].shape[:2] != (first := arrays[0].shape[:2]):
                shape = list(arrays[-1].shape[:2])
                raise ValueError(f"{path} has {shape} pixels, and the first file {list(first)}")
    channels = max(array.shape[2] for array in arrays)
    stacked = np.stack([np.broadcast_to(array, (*first, channels)) for array in arrays])
    return stacked, np.array(labels), [each.name for each in classes]


def _pixels(path: Path) -> np.ndarray:
    """[H, W, 1 or 3] uint8."""
    from PIL import Image  # matplotlib brings it

    try:
        with Image.open(path) as image:
            if image.mode not in (*GRAY, *COLOR):
                raise ValueError(
                    f"{path} is of Pillow's mode {image.mode}, not of 8 bits for each color; save "
                    "it so"
                )
            is_gray = image.mode in GRAY
            if image.has_transparency_data:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            pixels = np.asarray(image.convert("L" if is_gray else "RGB"))
    except (OSError, SyntaxError) as error:  # Pillow has both for a damaged file
        raise ValueError(f"{path} cannot be read: {error}") from error
    return pixels.reshape(*pixels.shape[:2], -1)


class NoisedImages(torch.utils.data.Dataset):
    """Noised images with the velocity to learn; a sample depends on seed and index alone.

    So a resumed run, and one on other layouts, sees the samples of a run that never stopped.
    """

    def __init__(
        self, images: Images, rows: Tensor, length: int, seed: int, class_dropout: float
    ) -> None:
        """Noise some of the images.

        Args:
            images: all images.
            rows: [R] int64, which of them.
            length: of the dataset; each epoch is in an order of its own.
            seed: of order, noise, times and dropped classes.
            class_dropout: how often the class is left out, which guidance needs.
        """
        self.images, self.rows, self.length, self.seed = images, rows, length, seed
        self.class_dropout = class_dropout
        self._order = lru_cache(maxsize=2)(self._order_of)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """``x`` and ``velocity`` [C, H, W] float32, ``time`` [] float32, ``label`` [] int64."""
        epoch, position = divmod(index, len(self.rows))
        row = self.rows[self._order(epoch)[position]]
        draw = _generator(self.seed, 1, index)
        image = scaled(self.images.pixels[row])
        noise = torch.randn(image.shape, generator=draw)
        time, dropped = torch.rand(2, generator=draw)
        x, velocity = noised(image, noise, time)
        label = self.images.labels[row]
        if dropped < self.class_dropout:
            label = torch.full_like(label, len(self.images.names))
        return {"x": x, "velocity": velocity, "time": time, "label": label}

    def _order_of(self, epoch: int) -> Tensor:
        return torch.randperm(len(self.rows), generator=_generator(self.seed, 0, epoch))


def scaled(pixels: Tensor) -> Tensor:
    """Bytes to float32 from -1 to 1."""
    return pixels.float() / 127.5 - 1


def _generator(*numbers: int) -> torch.Generator:
    """A generator for these numbers: near seeds are spread, as torch's do not."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


def split(images: Images, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows for training and for validation, drawn at random; two or more of each."""
    order = torch.randperm(len(images.labels), generator=_generator(seed, 2))
    held_out = min(max(2, round(fraction * len(order))), len(order) - 2)
    return order[held_out:], order[:held_out]
