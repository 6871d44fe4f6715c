"""Images changed at random, as cameras and their mountings vary: brightness, contrast, saturation, crop, rotation.

Legend: S image side, C channels.
"""

from __future__ import annotations

from typing import Annotated

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ki_vla_ros.robot import Frozen

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Augmentation(Frozen):
    """How far one camera's images are changed; each image draws its own values, evenly within these bounds."""

    brightness: Share = Field(default=0.1, description="added to all values, which are in -1..1")
    contrast: Share = Field(default=0.1, description="0.1: values are multiplied by 0.9 to 1.1")
    saturation: Share = Field(default=0.0, description="0.2: colours are 20 % paler to 20 % stronger")
    crop: Annotated[float, Field(ge=0.0, lt=0.9)] = Field(
        default=0.0, description="up to this share of each side is cut off, and the rest enlarged"
    )
    rotation_deg: Annotated[float, Field(ge=0.0, le=180.0)] = Field(default=0.0, description="turned by up to so much")

    @property
    def moves_pixels(self) -> bool:
        """Whether a place in the image is elsewhere afterwards."""
        return self.crop > 0.0 or self.rotation_deg > 0.0


def turn_and_crop(image_SSC: NDArray[np.uint8], change: Augmentation, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The image turned about a random window, which then fills it; border pixels are repeated where nothing was."""
    if not change.moves_pixels:
        return image_SSC
    size = len(image_SSC)
    kept = 1.0 - change.crop * rng.random()
    angle_deg = rng.uniform(-1.0, 1.0) * change.rotation_deg
    slack = (1.0 - kept) * size / 2.0
    middle = (size - 1) / 2.0
    to_SS = cv2.getRotationMatrix2D((middle, middle), angle_deg, 1.0 / kept)
    to_SS[:, 2] = to_SS[:, 2] + rng.uniform(-slack, slack, 2) / kept
    turned = cv2.warpAffine(image_SSC, to_SS, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(turned, dtype=np.uint8)


def recolour(image_CSS: NDArray[np.float32], change: Augmentation, rng: np.random.Generator) -> NDArray[np.float32]:
    """Brightness, contrast and saturation of an image in -1..1, changed in place and clipped to that range."""
    gain, offset, strength = (
        rng.uniform(-1.0, 1.0, 3) * (change.contrast, change.brightness, change.saturation)
    ).astype(np.float32)
    if change.saturation:
        grey_SS = image_CSS.mean(axis=0)
        image_CSS -= grey_SS
        image_CSS *= 1.0 + strength
        image_CSS += grey_SS
    image_CSS *= 1.0 + gain
    image_CSS += offset
    return np.clip(image_CSS, -1.0, 1.0, out=image_CSS)
