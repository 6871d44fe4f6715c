"""The bag that conversion is timed on: it converts, and its images are as large as a camera's."""

from pathlib import Path

from support.lerobot_runs import run

from ki_vla_ros.bags.bag import open_bag
from ki_vla_ros.messages.decoding import decode
from training.data.lerobot.dataset import Dataset
from training.speed.conversion import _options, main


def test_the_timed_bag_is_a_recording_of_two_cameras(tmp_path: Path) -> None:
    bag, out = tmp_path / "bag", tmp_path / "out"
    assert main(["make", str(bag), "--seconds", "1"]) == 0
    with open_bag(bag) as opened:
        assert {topic.count for topic in opened.topics.values()} == {30, 200, 10}
        sizes = [len(decode(m).data) for m in opened.messages() if "image_raw" in m.topic]
    assert len(sizes) == 60 and 40_000 < min(sizes) <= max(sizes) < 60_000
    assert run(*_options(bag, out), "--video", "jpeg") == 0
    assert Dataset(out).info.total_frames == 9
