"""Images for classifiers: the embedded digits, image folders, parquet, WebDataset shards and Hub data sets.

Training images go through timm's augmentation, evaluation images through its resize and centre crop.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch

from stableqat.data.datamodule import DataModule, Rows
from stableqat.data.embedded import DIGITS_MEAN, DIGITS_SIZE, DIGITS_STD, DigitsTransform, embedded_digits
from stableqat.data.holdout import check_share, held_out_images
from stableqat.data.image_rows import ImageReader, ImageRows
from stableqat.data.source import IMAGE_FORMATS, listed, load_splits, local_files
from stableqat.errors import UserError, check_range

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: How evaluation images are resized, cropped and normalised by default.
PREPROCESSING: dict[str, Any] = {
    "mean": IMAGENET_MEAN,
    "std": IMAGENET_STD,
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "crop_mode": "center",
}
BATCH_SIZE = 64
_DIGITS_FRACTION = 0.2
_MOST_CLASSES = 1_000_000
_READ: ContextVar[dict[tuple[Any, ...], dict[str, "Dataset"]]] = ContextVar("read")


@contextmanager
def reads_once() -> Iterator[None]:
    """Inside, data modules of the same source share what the first has read: folders of files are slow."""
    token = _READ.set({})
    try:
        yield
    finally:
        _READ.reset(token)


class ImageDataModule(DataModule):
    """Images for classifiers, as `pixel_values` (batch, channels, size, size) and `labels` (batch,).

    Args:
        source: An image folder (one folder per class), a parquet file or folder with an image column, a tar
            file or folder of them (WebDataset: 1.jpg, 1.cls, 2.jpg, ...), or a Hub name; null takes the
            embedded digits. Images are PNG, JPEG, WebP, BMP, TIFF or GIF, of 8 or 16 bits, or TIFF in
            floating point within [0, 1]. In a folder, parquet files whose names start with train, validation
            (valid, val, dev) or test, tar files whose names contain these, or folders with these names, make
            the splits.
        name: Configuration of a Hub data set.
        image_column: The column of images; null takes the one that holds images.
        label_column: The column of classes; null takes the one of class labels, or named label or cls.
        image_size: Height and width in pixels; null takes the model's on the command line, otherwise 8 for
            the digits and 224 for other images. A model without a size of its own takes this one.
        batch_size: Images per step and process. On the command line, null takes what fits the model, the
            source and the device; elsewhere it is 64.
        eval_batch_size: Images per step and process of an evaluation, which needs a fraction of training's
            memory; null takes batch_size.
        validation_fraction: Share of each class to hold out if the source has no validation split; the digits
            hold out every fifth image.
        augment: Augment training images: digits are shifted by at most one pixel, other images get the timm
            options below.
        repeated_augmentation: How often an image comes in a row, each time augmented anew: DeiT's 3 lets a
            step see a third of the images, three times. An epoch stays as long, and visits a third.
        scale: Smallest and largest share of the image's area that a random crop takes.
        hflip: Probability of a horizontal flip.
        color_jitter: Strength of changes in brightness, contrast and saturation; auto_augment replaces it.
        auto_augment: timm policy, such as rand-m9-mstd0.5-inc1; null for none.
        re_prob: Probability of erasing a random rectangle.
        crop_pct: Share of the image that evaluation's centre crop keeps. Here and in the next four options,
            null takes what the model was trained with on the command line, and otherwise ImageNet's usual
            value: 0.875.
        crop_mode: timm's center, squash or border; null: center.
        interpolation: How images are resized: bicubic, bilinear or nearest; null: bicubic.
        mean: Mean to subtract from each channel, for pixels in [0, 1]; the digits have their own.
        std: Standard deviation to divide each channel by; the digits have their own.
        num_workers: Processes that load batches in advance; 0 loads in the training process. On the command
            line, null takes a share of the cores that a GPU's process can use; elsewhere it is 0.
        seed: Decides the order and the augmentation; null takes the run's seed (seed_everything).
        cache_dir: Folder for prepared data; null takes the default folder of `datasets`.

    Raises:
        UserError: If a value is out of range, or a file is missing, empty or truncated.
    """

    training: ClassVar[bool] = True  # needs a train split; without a validation split, holds out a share

    def __init__(
        self,
        source: str | None = None,
        *,
        name: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        image_size: int | None = None,
        batch_size: int | None = BATCH_SIZE,
        eval_batch_size: int | None = None,
        validation_fraction: float = 0.1,
        augment: bool = True,
        repeated_augmentation: int = 1,
        scale: tuple[float, float] = (0.08, 1.0),
        hflip: float = 0.5,
        color_jitter: float = 0.4,
        auto_augment: str | None = None,
        re_prob: float = 0.0,
        crop_pct: float | None = None,
        crop_mode: Literal["center", "squash", "border"] | None = None,
        interpolation: str | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        num_workers: int | None = 0,
        seed: int | None = None,
        cache_dir: str | None = None,
    ):
        super().__init__(
            batch_size=BATCH_SIZE if batch_size is None else batch_size,
            num_workers=num_workers or 0,
            seed=seed,
            eval_batch_size=eval_batch_size,
            repeats=repeated_augmentation,
        )
        check_range("repeated_augmentation", repeated_augmentation, 1)
        if source is None and image_size not in (None, DIGITS_SIZE):
            raise UserError(f"image_size {image_size}: the embedded digits have {DIGITS_SIZE} pixels a side")
        check_range("image_size", image_size, 1, null=True)
        check_share(validation_fraction)
        if not 0 < scale[0] <= scale[1] <= 1:
            raise UserError(f"scale {list(scale)} must be two rising shares, above 0 and at most 1")
        if crop_pct is not None and not 0 < crop_pct <= 1:
            raise UserError(f"crop_pct {crop_pct} must be above 0 and at most 1")
        if interpolation not in ("bicubic", "bilinear", "nearest", None):
            raise UserError(f"interpolation {interpolation} must be bicubic, bilinear or nearest")
        check_range("hflip", hflip, 0, 1)
        check_range("re_prob", re_prob, 0, 1)
        if std is not None and min(std) <= 0:
            raise UserError(f"std {list(std)} must be positive")
        local = None if source is None else local_files(source, IMAGE_FORMATS, training=self.training)
        self._builder = None if local is None else local[0]
        self.source = source
        self.name = name
        self.image_column = image_column
        self.label_column = label_column
        self.image_size = image_size or (DIGITS_SIZE if source is None else 224)
        self.in_chans = 1 if source is None else 3
        self.validation_fraction = validation_fraction
        self.augment = augment
        self.cache_dir = cache_dir
        given: dict[str, Any] = {"mean": mean, "std": std, "interpolation": interpolation}
        given |= {"crop_pct": crop_pct, "crop_mode": crop_mode}
        self.preprocessing = self.evaluation_settings({"source": source, **given})
        self._augmentation: dict[str, Any] = {
            "scale": tuple(scale),
            "hflip": hflip,
            "color_jitter": color_jitter,
            "auto_augment": auto_augment,
            "re_prob": re_prob,
        }

    @classmethod
    def evaluation_settings(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """How evaluation images are resized and normalised, in the form of timm's `pretrained_cfg`.

        Args:
            arguments: The arguments of a data module, whose data need not exist.
        """
        given = {key: arguments.get(key) for key in PREPROCESSING}
        settings = PREPROCESSING | {key: value for key, value in given.items() if value is not None}
        settings |= {key: tuple(settings[key]) for key in ("mean", "std")}
        if arguments.get("source") is None:  # the digits are never resized
            settings |= {"mean": (DIGITS_MEAN,), "std": (DIGITS_STD,), "crop_pct": 1.0}
        return settings

    def _transform(self, training: bool) -> Callable[[Any, torch.Tensor], None]:
        """The transform of timm for training or evaluation."""
        from timm.data import create_transform

        from stableqat.data.augmentation import TimmTransform

        options = self.preprocessing
        if training:
            own = {key: value for key, value in options.items() if not key.startswith("crop")}
            options = own | self._augmentation
        try:
            return TimmTransform(create_transform(self._shape, is_training=training, **options))
        except (AssertionError, ValueError, KeyError) as error:
            policy = self._augmentation["auto_augment"]
            raise UserError(f"auto_augment {policy} is not a timm policy: {error}") from error

    @property
    def _shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image as the model sees it."""
        return self.in_chans, self.image_size, self.image_size

    @cached_property
    def _images(self) -> dict[str, "Dataset"]:
        """The splits of the source, with images not decoded; also finds both columns."""
        from datasets import ClassLabel, Image

        assert self.source is not None
        options: dict[str, Any] = {"cache_dir": self.cache_dir, "training": self.training}
        read, key = _READ.get({}), (self.source, self.name, *options.values())
        if key not in read:
            read[key] = load_splits(self.source, self.name, formats=IMAGE_FORMATS, **options)
        splits = read[key]
        features = next(iter(splits.values())).features
        columns = ", ".join(features)

        def find(column: str | None, what: str, fits: Callable[[str], bool]) -> str:
            found = [column] if column is not None else [key for key in features if fits(key)]
            if not found or found[0] not in features:
                missing = f"no column {column}" if column is not None else f"no column of {what}s"
                raise UserError(f"{self.source} has {missing} (it has {columns}): set {what}_column")
            if len(found) > 1:
                log.info("%s: taking %s of the columns %s", self.source, found[0], ", ".join(found))
            return found[0]

        def holds_images(key: str) -> bool:
            feature = features[key]
            return isinstance(feature, Image) or (isinstance(feature, dict) and "bytes" in feature)

        self.image_column = find(self.image_column, "image", holds_images)
        if not holds_images(self.image_column):
            raise UserError(f"column {self.image_column} of {self.source} holds no images: set image_column")
        labelled = any(isinstance(feature, ClassLabel) for feature in features.values())
        if not (labelled or "label" in features) and self._builder == "imagefolder":
            raise UserError(
                f"{self.source} has images outside the folders of their classes, or only one class: put each "
                "into the folder of its class, such as cat/1.png and dog/2.png, all equally deep"
            )

        def holds_labels(key: str) -> bool:
            return isinstance(features[key], ClassLabel) if labelled else key in ("label", "labels", "cls")

        self.label_column = find(self.label_column, "label", holds_labels)
        encoded = Image(decode=False)
        return {split: rows.cast_column(self.image_column, encoded) for split, rows in splits.items()}

    @cached_property
    def class_names(self) -> list[str]:
        """The names of the classes, by label."""
        from datasets import ClassLabel

        if self.source is None:
            return [str(digit) for digit in range(10)]
        known = [self._images["train"]] if "train" in self._images else list(self._images.values())
        feature = known[0].features[self.label_column]
        if isinstance(feature, ClassLabel):
            return list(feature.names)
        dtype = getattr(feature, "dtype", "")
        if "int" in dtype or dtype in ("bool", "string", "large_string"):
            values = set().union(*(rows.unique(self.label_column) for rows in known))
            if all(isinstance(value, str) for value in values):
                return sorted(values)
            if None not in values and min(values) >= 0:
                if max(values) < _MOST_CLASSES:
                    return [str(label) for label in range(max(values) + 1)]
                raise UserError(
                    f"column {self.label_column} of {self.source} has label {max(values)}, too large for a "
                    "class: number classes from 0, or set label_column"
                )
        raise UserError(f"column {self.label_column} of {self.source} holds no classes: set label_column")

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    def _is_hidden(self, split: str) -> bool:
        """Whether a test split has no labels: some are published without, as ImageNet's is."""
        if split != "test" or any(
            value not in (-1, None) for value in self._images[split][self.label_column]
        ):
            return False
        log.info("%s: leaving out the test split, which has no labels", self.source)
        return True

    def _labels(self, split: str) -> np.ndarray:
        """The labels of a split as integers, checked against the classes."""
        values = self._images[split][self.label_column][:]
        index = {class_name: label for label, class_name in enumerate(self.class_names)}
        labels = [index.get(value, -1) if isinstance(value, str) else value for value in values]
        for row, label in enumerate(labels):
            if label is None or not 0 <= label < self.num_classes:
                raise UserError(
                    f"{split} row {row} of {self.source} has label {values[row]}, which is not one of the "
                    f"{self.num_classes} training classes: repair or remove it"
                )
        return np.array(labels, np.int64)

    def prepare_data(self) -> None:
        """Fill the caches and read the headers of images, on one process per machine."""
        super().prepare_data()
        for rows in self.splits.values():
            if isinstance(rows, ImageRows) and isinstance(rows.read, ImageReader):
                rows.read.look()

    def load(self) -> dict[str, Rows]:
        """The splits as images and labels.

        Raises:
            UserError: If a column is missing, a label is outside the classes, or no image can be held out.
        """
        if self.source is None:
            pixels, classes = embedded_digits()
            held = held_out_images(classes, _DIGITS_FRACTION)
            return {
                "train": ImageRows(
                    pixels[~held].__getitem__, classes[~held], DigitsTransform(self.augment), self._shape
                ),
                "validation": ImageRows(
                    pixels[held].__getitem__, classes[held], DigitsTransform(False), self._shape
                ),
            }

        labels = {split: self._labels(split) for split in self._images if not self._is_hidden(split)}
        known = set(labels["train"].tolist()) if "train" in labels else set()
        for split in labels if known else ():
            of_split = set(labels[split].tolist())
            for lost, of, what in ((of_split - known, split, "training"), (known - of_split, "train", split)):
                if lost:
                    names = listed([self.class_names[label] for label in sorted(lost)])
                    told = self.source, len(lost), of, what, names
                    log.warning("%s: %d classes of %s have no %s image: %s", *told)
        # Each split, with the split of the source that it comes from and its rows there.
        chosen = {split: (split, np.arange(len(labels[split]))) for split in labels}
        if self.training and "validation" not in labels:
            held = held_out_images(labels["train"], self.validation_fraction)
            if not held.any():
                few = f"validation_fraction {self.validation_fraction} of {len(held)} images holds out none"
                raise UserError(f"{few}: raise it or add a validation split")
            chosen["train"] = "train", np.flatnonzero(~held)
            chosen["validation"] = "train", np.flatnonzero(held)
        splits: dict[str, Rows] = {}
        for split, (origin, rows) in chosen.items():
            assert self.image_column is not None
            read = ImageReader(self._images[origin], self.image_column, rows, f"{self.source} {origin}")
            transform = self._transform(training=split == "train" and self.augment)
            splits[split] = ImageRows(read.with_cache(), labels[origin][rows], transform, self._shape)
        return splits
