"""Where batches come from: data sets of samples, mixtures of them, `Source.draw(count, rng) -> Batch`.

A name is loaded when it is first used: what converts bags, in many processes, needs data sets but no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOMES = {
    "augmentation": ("Augmentation",),
    "batch": ("NO_TARGET", "Batch", "BatchForm", "BatchMaker"),
    "embodiment": ("Embodiment", "fit_fast", "whole_chunks"),
    "loader": ("Loader",),
    "numbers": ("draw_numbers",),
    "samples": ("Check", "Labels", "LanguageSample", "RobotSample", "RobotSamples", "Samples"),
    "source": ("Mixture", "Part", "Source"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"training.data.{home}"), name)
    raise AttributeError(f"module 'training.data' has no attribute {name!r}")
