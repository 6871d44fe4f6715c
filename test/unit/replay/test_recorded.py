"""What a recorded tick says of the readings that it used."""

from __future__ import annotations

import pytest

from ki_vla_ros.replay.recorded import RecordedTick

IMAGES = 1000


def tick(*joint_ns: int) -> RecordedTick:
    return RecordedTick(1100, 0, {"scene": 1010, "wrist": IMAGES}, joint_ns, None, "", None)


@pytest.mark.parametrize(
    ("joint_ns", "parts", "spans"),
    [
        ((1000,), 1, [(1000,)]),
        ((990, 1005), 1, [(990, 1005)]),
        ((990, 1005, 980, 1030), 2, [(990, 1005), (980, 1030)]),
        ((990, 1005, 970), 2, [(990, 1005), (970,)]),  # of the second, nothing newer had come
        ((1000, 980, 1030), 2, [(1000,), (980, 1030)]),  # the first was taken with the images
        ((980, 1030, 1000, 999), 3, [(980, 1030), (1000,), (999,)]),
        ((990, 970, 1005, 980), 3, [(990,), (970, 1005), (980,)]),
        ((1050, 1060), 2, [(1050,), (1060,)]),  # the newest of each part
        ((990, 1005, 970), 3, [(990,), (1005,), (970,)]),
        ((990, 1005), 3, None),
        ((990, 1005, 980, 1030), 1, None),
        ((), 1, None),
    ],
)
def test_stamps_part_by_part(joint_ns: tuple[int, ...], parts: int, spans: list[tuple[int, ...]] | None) -> None:
    assert tick(*joint_ns).spans(parts) == spans
