"""Where batches come from: data sets of samples, mixtures of them, `Source.draw(count, rng) -> Batch`."""

from training.data.augmentation import Augmentation
from training.data.batch import NO_TARGET, Batch, BatchForm, BatchMaker
from training.data.embodiment import Embodiment, fit_fast, whole_chunks
from training.data.loader import Loader
from training.data.numbers import draw_numbers
from training.data.samples import Check, Labels, LanguageSample, RobotSample, RobotSamples, Samples
from training.data.source import Mixture, Part, Source

__all__ = [
    "NO_TARGET",
    "Augmentation",
    "Batch",
    "BatchForm",
    "BatchMaker",
    "Check",
    "Embodiment",
    "Labels",
    "LanguageSample",
    "Loader",
    "Mixture",
    "Part",
    "RobotSample",
    "RobotSamples",
    "Samples",
    "Source",
    "draw_numbers",
    "fit_fast",
    "whole_chunks",
]
