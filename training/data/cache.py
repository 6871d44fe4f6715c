"""Images that were decoded before, at the model's size, shared by all processes that are forked later."""

from __future__ import annotations

import mmap
import threading

import numpy as np
from numpy.typing import NDArray

from training.data.samples import Image

GIB = 1 << 30
CACHE_BYTES = 2 * GIB


class ImageCache:
    """Up to `count` images [S, S, 3], by number, in at most `most_bytes`.

    Each image has a place of its own and keeps it; where there is no room for all, those with the higher numbers have
    none. Samples are drawn at random, so no other choice would be found more often, and nothing is ever overwritten:
    neither a lock nor an index is needed, and a process may end at any moment.
    """

    def __init__(self, count: int, size: int, most_bytes: int = CACHE_BYTES) -> None:
        places = min(count, max(0, most_bytes) // (size * size * 3))
        # Shared, and taken from the system only as it is filled. An empty one cannot be made.
        self._image_NSS3 = np.frombuffer(mmap.mmap(-1, max(1, places * size * size * 3)), dtype=np.uint8)
        self._image_NSS3 = self._image_NSS3[: places * size * size * 3].reshape(places, size, size, 3)
        self._there_N = np.frombuffer(mmap.mmap(-1, max(1, places)), dtype=np.uint8)[:places]
        self._fence = threading.Lock()

    def get(self, number: int) -> Image | None:
        """The image, which must not be written to; None if it is not there."""
        if number >= len(self._there_N) or not self._there_N[number]:
            return None
        self._order()
        image: NDArray[np.uint8] = self._image_NSS3[number].view()
        image.flags.writeable = False
        return image

    def put(self, number: int, image: Image) -> None:
        if number < len(self._there_N):
            self._image_NSS3[number] = image
            self._order()
            self._there_N[number] = 1

    def _order(self) -> None:
        """Some processors show others what was written in another order; taking a lock keeps it."""
        with self._fence:
            pass
