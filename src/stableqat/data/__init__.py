"""The data that models train on: text packed into rows, and images with their labels.

Both LightningDataModules serve an embedded default set, local files and the hub's data sets through one
order of samples that depends on the seed and the position alone, never on the number of processes or workers.
"""

from stableqat.data.image import ImageDataModule
from stableqat.data.text import TextDataModule

__all__ = ["ImageDataModule", "TextDataModule"]
