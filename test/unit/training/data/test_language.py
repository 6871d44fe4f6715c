"""Vision-language data from files: samples are what the files say, and places follow the images into their squares."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError
from support.language_files import find_spot, picture, png, write_lines, write_parquet, write_pictures

from ki_vla_ros.errors import ConfigurationError, InputError
from training.data.language import LanguageData, LanguageEntry, LlavaEntry, PaliGemmaEntry, ParquetEntry, open_language
from training.data.language.places import Frame, only_place, write_boxes
from training.data.loader import Loader
from training.data.samples import LanguageSample

SIZE = 64
WIDE = picture(96, 48, spot=(0.25, 0.75))


def opened(**entry: Any) -> LanguageData:
    made: PaliGemmaEntry | LlavaEntry | ParquetEntry = TypeAdapter(LanguageEntry).validate_python(entry)
    return open_language(made, SIZE)


def paligemma(folder: Path, rows: Sequence[Any], **options: Any) -> LanguageData:
    write_pictures(folder, {"a.png": WIDE, "b.png": picture(48, 48)})
    return opened(paligemma=write_lines(folder / "data.jsonl", rows), **options)


def llava(folder: Path, rows: Sequence[Any], **options: Any) -> LanguageData:
    write_pictures(folder / "pictures", {"a.png": WIDE, "b.png": picture(48, 48)})
    file = folder / "data.json"
    file.write_text(json.dumps(rows, indent=1))
    return opened(llava=file, images=folder / "pictures", **options)


def talk(*turns: str, image: Any = "a.png", **more: Any) -> dict[str, Any]:
    who = ("human", "gpt")
    row = {"conversations": [{"from": who[i % 2], "value": turn} for i, turn in enumerate(turns)], **more}
    return row if image is None else {"image": image, **row}


def texts_of(samples: Sequence[LanguageSample]) -> list[tuple[str, str]]:
    return [(sample.prefix, sample.suffix) for sample in samples]


def near(place: tuple[float, float] | None, expected: tuple[float, float], within: float) -> bool:
    return place is not None and bool(np.abs(np.subtract(place, expected)).max() <= within)


# Places


@pytest.mark.parametrize(("width", "height"), [(96, 48), (48, 96), (64, 64), (640, 480), (31, 77)])
@pytest.mark.parametrize("spot", [(0.25, 0.75), (0.8, 0.3)])
def test_a_place_is_where_the_square_shows_it(
    tmp_path: Path, width: int, height: int, spot: tuple[float, float]
) -> None:
    """The pixels say so: the same spot is found in the image that the model is given."""
    write_pictures(tmp_path, {"x.png": picture(width, height, spot)})
    u, v = spot
    text = f"<loc{int(v * 1024):04d}><loc{int(u * 1024):04d}>"
    rows = [{"image": "x.png", "prefix": "point", "suffix": text}, {"image": "x.png", "prefix": "p", "suffix": "s"}]
    rows[1]["place"] = [u, v]  # type: ignore[assignment]
    data = opened(paligemma=write_lines(tmp_path / "d.jsonl", rows))
    pointed, labelled = data.take([0, 1])
    assert pointed.images[0].shape == (SIZE, SIZE, 3)
    shown, pixel = find_spot(pointed.images[0]), 1.0 / SIZE
    assert near(pointed.labels.place, shown, 1.5 * pixel) and near(labelled.labels.place, shown, 1.5 * pixel)
    assert near(only_place(pointed.suffix), shown, 1.5 * pixel)


def test_places_of_a_square_image_stay_as_they_are() -> None:
    text = "".join(f"<loc{i:04d}>" for i in range(1024))
    assert Frame.of(224, 224, 224).move(text) == text
    assert Frame.of(100, 100, 224).move(f"a {text} b") == f"a {text} b"


def test_places_of_a_wide_image_move_down_and_not_across() -> None:
    frame = Frame.of(96, 48, 64)  # in the square's middle half
    assert frame.move("<loc0000><loc0000><loc1023><loc1023> mug") == "<loc0256><loc0000><loc0767><loc1023> mug"
    assert frame.place(0.5, 0.5) == (0.5, 0.5) and frame.place(1.0, 0.0) == (1.0, 0.25)
    with pytest.raises(InputError, match="expected places in pairs, first down and then across"):
        frame.move("<loc0000><loc0001><loc0002> mug")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("it is <box>(250,500),(750,1000)</box>.", "it is <loc0512><loc0256><loc1023><loc0768>."),
        ("<ref>mug</ref><box>(250, 500), (750, 1000)</box>", "mug<loc0512><loc0256><loc1023><loc0768>"),
        (
            "<|object_ref_start|>mug<|object_ref_end|><|box_start|>(250,500),(750,1000)<|box_end|>",
            "mug<loc0512><loc0256><loc1023><loc0768>",
        ),
        ("<box>[[250, 500, 750, 1000]]</box>", "<loc0512><loc0256><loc1023><loc0768>"),
        (
            '{"bbox_2d": [250, 500, 750, 1000], "label": "mug"}',
            '{"bbox_2d":<loc0512><loc0256><loc1023><loc0768>, "label": "mug"}',
        ),
        ('{"point_2d": [250, 500]}', '{"point_2d":<loc0512><loc0256>}'),
        ("(250,500),(750,1000)", "(250,500),(750,1000)"),
    ],
)
def test_boxes_of_others_become_places_down_before_across(text: str, expected: str) -> None:
    assert write_boxes(text, Frame(100, 100), "thousandths") == expected


@pytest.mark.parametrize(
    ("unit", "box", "expected"),
    [
        ("pixels", "(50,10),(100,40)", "<loc0204><loc0256><loc0819><loc0512>"),
        ("fractions", "(0.25,0.2),(0.5,0.8)", "<loc0204><loc0256><loc0819><loc0512>"),
        ("pixels", "(0,0),(200.1,50)", "<loc0000><loc0000><loc1023><loc1023>"),
    ],
)
def test_units_of_boxes(unit: Any, box: str, expected: str) -> None:
    assert write_boxes(f"<box>{box}</box>", Frame(200, 50), unit) == expected


@pytest.mark.parametrize(
    ("box", "fault"),
    [
        ("(1,2),(1200,300)", r"x1 <= 1000 .* \(thousandths\), got 1, 2, 1200, 300; is it in another unit"),
        ("(500,2),(400,300)", "expected x0 <= x1"),
        ("(-30,2),(400,300)", "expected x0 <= x1"),
        ("(1,2)", r"expected \(x0,y0\),\(x1,y1\)"),
        ("somewhere", r"expected \(x0,y0\),\(x1,y1\)"),
    ],
)
def test_boxes_that_are_none_are_refused(box: str, fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        write_boxes(f"it is <box>{box}</box>", Frame(100, 100), "thousandths")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("<loc0000><loc0512><loc0512><loc1023> mug", (0.75, 0.25)),
        ("<loc0256> <loc0512>", (0.5, 0.25)),
        ("<loc0000><loc0512><loc0512><loc1023><seg001><seg002> mug", (0.75, 0.25)),
        ("<loc0000><loc0512><loc0512><loc1023> mug ; <loc0000><loc0512><loc0512><loc1023> cup", None),
        ("mug", None),
    ],
)
def test_a_text_with_one_box_has_a_place(text: str, place: tuple[float, float] | None) -> None:
    found = only_place(text)
    assert found is None if place is None else near(found, place, 1e-3)


# PaliGemma's jsonl

BOX = "<loc0256><loc0512><loc0768><loc1023> mug"


def test_lines_of_paligemma(tmp_path: Path) -> None:
    rows = [
        {"image": "b.png", "prefix": "caption en", "suffix": "a mug"},
        "",
        {"image": "b.png", "prefix": "detect mug", "suffix": BOX, "id": 7},
        {"image": ["b.png", "a.png"], "prefix": "where is it ?", "suffix": "left", "place": [0.5, 0.5]},
        {"image": "b.png", "prefix": "", "suffix": "Größe 3"},
        {"image": "b.png", "cells": [0, 1, 2, 3]},
    ]
    data = paligemma(tmp_path, rows)
    caption, box, two, bare, cells = data.take(range(len(data)))
    assert (caption.prefix, caption.suffix, caption.labels.place) == ("caption en", "a mug", None)
    assert box.suffix == BOX and near(box.labels.place, (0.75, 0.5), 1e-3)
    assert len(two.images) == 2 and two.labels.place == (0.5, 0.5)
    assert np.array_equal(two.images[1][0], np.zeros((SIZE, 3)))  # the wide image's bar
    assert (bare.prefix, bare.suffix) == ("", "Größe 3")
    assert (cells.prefix, cells.suffix) == ("", "") and cells.labels.cells_VN is not None
    assert cells.labels.cells_VN.tolist() == [[0, 1, 2, 3]]
    assert list(data.texts())[:2] == ["caption en", "a mug"] and len(list(data.texts())) == 10
    assert data.where(1).endswith("data.jsonl: line 3")


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        ({"image": "b.png", "label": "3"}, {"prefix": "count"}, ("count", "3")),
        ({"image": "b.png", "suffix": "a", "prefix": "b"}, {"prefix": "caption en"}, ("b", "a")),
        ({"image_path": "b.png", "question": "how many ?", "answer": 4}, {}, ("how many ?", "4")),
        ({"images": ["b.png"], "prompt": "caption en", "text": "a"}, {}, ("caption en", "a")),
        ({"image": "b.png", "prefix": "p", "suffix": "s", "text": "x"}, {"ignore": ["text"]}, ("p", "s")),
    ],
)
def test_other_names_of_keys(
    tmp_path: Path, row: dict[str, Any], options: dict[str, Any], expected: tuple[str, str]
) -> None:
    assert texts_of(paligemma(tmp_path, [row], **options).take([0])) == [expected]


GOOD = {"image": "b.png", "prefix": "caption en", "suffix": "a mug"}
BROKEN: list[tuple[Any, str]] = [
    ({**GOOD, "image": "c.png"}, r"image: expected .*c\.png, found no such file"),
    ({**GOOD, "image": "data.jsonl"}, "expected a jpeg or png image"),
    ({**GOOD, "image": "half.png"}, "expected a whole png image"),
    ({**GOOD, "image": "."}, "image: expected a file, got none .*folder"),
    ({**GOOD, "image": "http://x/a.png"}, "expected the name of a file, .* download it first"),
    ({**GOOD, "image": 3}, "expected the name of a file, got 3"),
    ({**GOOD, "image": "a\0b"}, "image: expected a file, got none"),
    ({"prefix": "caption en", "suffix": "a mug"}, "expected image"),
    ({**GOOD, "suffix": ""}, "expected an answer, got an empty one"),
    ({**GOOD, "suffix": " \n"}, "expected an answer, got an empty one"),
    ({**GOOD, "suffix": None}, "expected suffix"),
    ({"image": "b.png", "suffix": "a mug"}, "prefix: expected one in the row, or for all rows"),
    ({**GOOD, "suffix": ["a", "b"]}, r"suffix: expected a text, got \['a', 'b'\]"),
    ({**GOOD, "suffix": "<loc1024><loc0000>"}, "expected places <loc0000> to <loc1023>"),
    ({**GOOD, "suffix": "<loc_16> <loc_3>"}, "expected places <loc0000> to <loc1023>"),
    ({**GOOD, "suffix": "<loc0001>"}, "expected places in pairs"),
    ({**GOOD, "suffix": "a mug<eos>"}, "got the token <eos>"),
    ({**GOOD, "place": [0.5, 1.5]}, "place: expected u and v in 0 to 1, got 0.5, 1.5"),
    ({**GOOD, "place": [0.5]}, r"place: expected \[u, v\]"),
    ({**GOOD, "place": [float("nan"), 0.5]}, r"place: expected \[u, v\]"),
    ({**GOOD, "plcae": [0.5, 0.5]}, "'plcae': expected no such key; did you mean 'place'"),
    ({**GOOD, "answer": "x"}, "expected one suffix, got suffix and answer"),
    ({**GOOD, "cells": [0, 1, 2]}, r"cells: expected a square of cells for each of 1 images, got \[3\]"),
    ({**GOOD, "cells": [0, -1, 2, 3]}, "cells: expected a list of whole numbers"),
    ({**GOOD, "image": "a.png", "cells": [0, 1, 2, 3]}, "cells: expected square images"),
    ('{"image": "b.png", "prefix": "x"', "expected a JSON object, got none"),
    ('{"image": "b.png", "image": "a.png"}', "expected each key once"),
    ("17", "expected a JSON object, got 17"),
    ('{"image": "b.png", "prefix": "p", "suffix": "half \\ud800"}', "expected characters, got half of one"),
]


@pytest.mark.parametrize(("row", "fault"), BROKEN)
def test_a_broken_line_is_named(tmp_path: Path, row: Any, fault: str) -> None:
    write_pictures(tmp_path, {"half.png": WIDE})
    (tmp_path / "half.png").write_bytes(png(WIDE)[:-30])
    data = paligemma(tmp_path, [GOOD] * 4 + [row])
    assert len(data.take(range(4))) == 4
    with pytest.raises(InputError, match=rf"data\.jsonl: line 5: .*{fault}"):
        data.take([4])
    assert list(data.texts())[:8] == ["caption en", "a mug"] * 4  # the words of the others are there
    with pytest.raises(ConfigurationError, match=rf"data\.jsonl: line 1: .*{fault}.* names all that is broken"):
        paligemma(tmp_path, [row])


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "expected at least one JSON object"),
        (b"\n\n", "expected at least one JSON object"),
        (b"[]", "expected at least one JSON object"),
        (b'[{"a": 1}', "has no end; is the copy whole"),
        (b'[{"a": "1}]', "has no end; is the copy whole"),
        (b'[{"a": 1}] [', "something follows the list"),
        (b'[{"a": 1} {"a": 2}]', "after 1 objects there is"),
        (b'[1, {"a": 2}]', "after 0 objects there is"),
        (b'[{"a": 2}, "x"]', "after 1 objects there is"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, content: bytes, fault: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ConfigurationError, match=rf"x\.json: .*{fault}"):
        opened(llava=tmp_path / "x.json")
    with pytest.raises(ConfigurationError, match=r"y\.json: expected a file .* found none"):
        opened(llava=tmp_path / "y.json")


def test_files_of_many_lines_are_read_at_random(tmp_path: Path) -> None:
    rows = [{**GOOD, "suffix": f"mug {n} " + "x" * (n % 7)} for n in range(300)]
    data = paligemma(tmp_path, rows)
    order = np.random.default_rng(0).permutation(300)
    assert [sample.suffix.split()[1] for sample in data.take(order)] == [str(n) for n in order]


def test_broken_lines_may_be_passed_over_up_to_a_share(tmp_path: Path) -> None:
    rows = [{**GOOD, "suffix": f"mug {n}"} for n in range(20)]
    rows[7] = rows[8] = {**GOOD, "image": "c.png"}
    data = paligemma(tmp_path, rows, broken_percent=10)
    found = [sample.suffix for sample in data.take([6, 7, 8, 9, 7])]
    assert found == ["mug 6", "mug 9", "mug 9", "mug 9", "mug 9"]  # the next one, always the same
    assert sorted(data.broken) == [7, 8] and "line 8: image: expected" in data.broken[7]
    few = paligemma(tmp_path, rows, broken_percent=5)
    (suffix,) = Loader(lambda _: few.take([8])[0].suffix, 1).iterate(range(1))
    assert suffix == "mug 9" and list(few.broken) == [8]
    with pytest.raises(InputError, match=r"line 8: image: expected .*; passed over before: 1"):
        few.take([7])
    rows[19] = {**GOOD, "image": "c.png"}
    assert paligemma(tmp_path, rows, broken_percent=15).take([19])[0].suffix == "mug 0"


# Conversations


def test_each_answer_is_a_sample_after_what_was_said(tmp_path: Path) -> None:
    rows = [
        talk("<image>\nWhere is the mug?", "<box>(500,0),(1000,1000)</box>", "And now?", "Gone."),
        {
            "images": ["b.png", "a.png"],
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "First <image>, then <image>: same?"},
                {"role": "assistant", "content": "no"},
            ],
        },
    ]
    data = llava(tmp_path, rows)
    where, now, same = data.take(range(len(data)))
    box = "<loc0256><loc0512><loc0768><loc1023>"  # of the wide image's square
    assert texts_of([where, now]) == [
        ("Where is the mug?", box),
        (f"Where is the mug?\n{box}\nAnd now?", "Gone."),
    ]
    assert near(where.labels.place, (0.75, 0.5), 2e-3) and now.labels.place is None
    assert len(same.images) == 2 and same.prefix == "Be brief.\nFirst, then: same?"
    assert data.where(1).endswith("data.json: entry 1, answer 2") and data.where(2).endswith("entry 2")
    write_lines(tmp_path / "data.jsonl", rows)
    lines = opened(llava=tmp_path / "data.jsonl", images=tmp_path / "pictures")
    assert texts_of(lines.take(range(3))) == texts_of([where, now, same])
    assert lines.where(2).endswith("data.jsonl: line 2")


def test_images_in_the_parts_of_a_turn(tmp_path: Path) -> None:
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is it?"}]
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a mug"}]}
    (sample,) = llava(tmp_path, [row]).take([0])
    assert (sample.prefix, sample.suffix, len(sample.images)) == ("What is it?", "a mug", 1)


def test_rows_of_text_alone_are_counted_or_kept(tmp_path: Path) -> None:
    rows = [talk("<image>\nWhat?", "A mug."), *[talk("Say hello", "Hello.", image=None)] * 2]
    data = llava(tmp_path, rows)
    assert len(data) == 1 and data.notes == [
        f"2 rows without an image left out (text_only: leave out), the first: {tmp_path / 'data.json'}: entry 2"
    ]
    kept = llava(tmp_path, rows, text_only="keep")
    assert len(kept) == 3 and kept.take([2])[0].images == ()
    with pytest.raises(ConfigurationError, match=r"expected samples, got none: 2 rows without an image"):
        llava(tmp_path, rows[1:])


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (talk("<image>\n<image>\nWhat?", "A mug."), "expected it once for each of 1 images, got it 2 times"),
        (talk("What?", "<image>A mug."), "expected <image> in questions alone"),
        (talk("What?"), "expected an answer to each question, got 1 turns"),
        (talk("What?", ""), "expected an answer, got an empty one"),
        (talk("What?", "A mug.", "And?"), "expected an answer to each question, got 3 turns"),
        ({"image": "a.png", "conversations": []}, "expected a list of turns"),
        ({"image": "a.png"}, "expected conversation"),
        (
            {"image": "a.png", "conversations": [{"from": "gpt", "value": "A mug."}]},
            "turn 1: expected human or user, got 'gpt'",
        ),
        (talk("<video>\nWhat?", "A mug.", image=None, video="a.mp4"), "'video': expected no such key"),
        (talk("Where?", "<box>(1,2),(3,4000)</box>"), "box: expected x0 <= x1 <= 1000"),
        (talk("Where?", "<box>(1,2)</box>"), "box: expected"),
        ([talk("What?", "A mug.")], "expected a JSON object, got"),
    ],
)
def test_a_broken_conversation_is_named(tmp_path: Path, row: Any, fault: str) -> None:
    good = talk("<image>\nWhat?", "A mug.")
    data = llava(tmp_path, [good] * 4 + [row])
    assert len(data) >= 5 and len(data.take(range(4))) == 4
    with pytest.raises(InputError, match=rf"data\.json: entry 5.*: .*{fault}"):
        data.take([4])


# Parquet


def inside(*pictures: Any) -> list[dict[str, Any]]:
    return [{"bytes": png(p), "path": f"{i}.png"} for i, p in enumerate(pictures)]


def test_captions_are_a_sample_each(tmp_path: Path) -> None:
    captions = [["a mug", "one mug"], ["a cup"], ["a pot"], []]
    columns = {"image": inside(*[WIDE] * 4), "captions": captions, "url": ["x"] * 4}
    file = write_parquet(tmp_path / "p" / "train-0.parquet", columns)
    data = opened(parquet=file)
    every = ("a mug", "one mug", "a cup", "a pot")
    assert texts_of(data.take(range(4))) == [("caption en", text) for text in every]
    assert data.where(1).endswith("train-0.parquet: row 0, caption 2") and len(data) == 5
    with pytest.raises(InputError, match=r"row 3: caption: expected a text, got \[\]"):
        data.take([4])
    assert list(data.texts()) == [text for one in every for text in ("caption en", one)]


def test_questions_with_several_answers(tmp_path: Path) -> None:
    columns = {
        "image": [png(WIDE)] * 3,
        "question": ["What?"] * 3,
        "answers": [["mug", "cup", "cup"], ["mug"], ["cup", "mug"]],
    }
    data = opened(parquet=write_parquet(tmp_path / "p.parquet", columns), prefix="answer en {question}")
    found = texts_of(data.take([0, 1, 2]))
    assert found == [("answer en What?", "cup"), ("answer en What?", "mug"), ("answer en What?", "cup")]


def test_labelled_boxes_become_a_detection(tmp_path: Path) -> None:
    objects = [
        {"bbox": [[48.0, 12.0, 48.0, 24.0]], "category": [1]},
        {"bbox": [[0.0, 0.0, 48.0, 48.0], [48.0, 12.0, 48.0, 24.0], [0, 0, 9.6, 48.0]], "category": [1, 0, 1]},
    ]
    features = {"objects": {"feature": {"category": {"names": ["cup", "mug"], "_type": "ClassLabel"}, "bbox": {}}}}
    file = write_parquet(tmp_path / "p.parquet", {"image": inside(WIDE, WIDE), "objects": objects}, features)
    one, several = opened(parquet=file, boxes="xywh").take([0, 1])
    box = "<loc0384><loc0512><loc0640><loc1023>"  # the wide image fills the square's middle half
    assert (one.prefix, one.suffix) == ("detect mug", f"{box} mug")
    assert near(one.labels.place, (0.75, 0.5), 2e-3) and several.labels.place is None
    assert several.prefix == "detect mug ; cup"
    assert several.suffix.split(" ; ")[1:] == [f"{box} cup", "<loc0256><loc0000><loc0768><loc0102> mug"]
    with pytest.raises(ConfigurationError, match=r"boxes: expected xywh .* or xyxy .* for objects.bbox, got none"):
        opened(parquet=file)


def test_flat_columns_of_one_box(tmp_path: Path) -> None:
    columns = {"photo": inside(WIDE), "where": [[48.0, 12.0, 96.0, 36.0]], "what": ["mug"]}
    file = write_parquet(tmp_path / "p.parquet", columns)
    entry = {"image": "photo", "bbox": "where", "label": "what", "boxes": "xyxy", "prefix": "find {label}"}
    (sample,) = opened(parquet=file, **entry).take([0])
    assert (sample.prefix, sample.suffix) == ("find mug", "<loc0384><loc0512><loc0640><loc1023> mug")


def test_shards_are_read_at_random(tmp_path: Path) -> None:
    names = [f"mug {n}" for n in range(11)]
    for shard, part in enumerate((names[:7], names[7:])):
        pictures = inside(*[WIDE] * len(part))
        write_parquet(tmp_path / "d" / f"train-0000{shard}-of-00002.parquet", {"image": pictures, "text": part})
    data = opened(parquet=tmp_path / "d")
    order = np.random.default_rng(0).permutation(11)
    assert [sample.suffix for sample in data.take(order)] == [names[n] for n in order]
    assert data.where(8).endswith("train-00001-of-00002.parquet: row 1")
    write_parquet(tmp_path / "d" / "test-0.parquet", {"image": inside(WIDE), "text": ["x"]})
    with pytest.raises(
        ConfigurationError, match=r"expected the files of one split, got those of test, train; name one"
    ):
        opened(parquet=tmp_path / "d")
    assert len(opened(parquet=tmp_path / "d" / "train-*.parquet")) == 11


@pytest.mark.parametrize(
    ("columns", "options", "fault"),
    [
        ({"image": [1], "text": ["a"]}, {}, "image: expected bytes or a path, got 1"),
        ({"image": [b"x"], "text": ["a"]}, {}, "expected a jpeg or png image"),
        ({"image": [{"bytes": None, "path": "c.png"}], "text": ["a"]}, {}, r"expected .*c\.png, found no such file"),
        ({"image": [b"x"], "question": ["a"], "answers": [[]]}, {}, "at least one, got an empty list|jpeg"),
        ({"photo": [b"x"], "text": ["a"]}, {}, "expected image, and .* got photo, text; name the columns"),
        ({"image": [b"x"], "words": ["a"]}, {}, "expected image, and .* got image, words; name the columns"),
        ({"image": [b"x"], "text": ["a"]}, {"caption": "words"}, "caption: expected one of image, text, got 'words'"),
        (
            {"image": [b"x"], "text": ["a"], "question": ["b"]},
            {"caption": "text", "question": "question"},
            "expected columns of one task, got those of 2",
        ),
        (
            {"image": [png(WIDE)], "bbox": [[1.0, 2.0, 3.0, 4.0]], "label": [7]},
            {"boxes": "xyxy"},
            "label: expected a name, got the number 7",
        ),
        (
            {"image": [png(WIDE)], "bbox": [[1.0, 2.0, 300.0, 4.0]], "label": ["mug"]},
            {"boxes": "xyxy"},
            r"box: expected x0 <= x1 <= 96 and y0 <= y1 <= 48 \(pixels\), got 1, 2, 300, 4",
        ),
        (
            {"image": [png(WIDE)], "bbox": [[[1.0, 2.0, 3.0, 4.0]]], "label": [["mug", "cup"]]},
            {"boxes": "xyxy"},
            "label: expected one for each of 1 boxes, got 2",
        ),
        ({"image": [png(WIDE)], "text": ["a"], "place": [[0.5, 2.0]]}, {}, "place: expected u and v in 0 to 1"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(
    tmp_path: Path, columns: dict[str, Any], options: dict[str, Any], fault: str
) -> None:
    file = write_parquet(tmp_path / "p.parquet", columns)
    with pytest.raises(ConfigurationError, match=rf"p\.parquet: .*({fault})"):
        opened(parquet=file, **options)


def test_a_damaged_table_is_refused(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "p.parquet", {"image": inside(WIDE), "text": ["a"]})
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ConfigurationError, match=r"p\.parquet: expected a whole parquet file"):
        opened(parquet=file)
    with pytest.raises(ConfigurationError, match="expected a parquet file, found none"):
        opened(parquet=tmp_path / "q.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError, match="expected a parquet file, or a folder of them, found none"):
        opened(parquet=tmp_path / "empty")


# Entries of a configuration


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        ({"paligemma": "a", "llava": "b"}, "one of the keys paligemma, llava, parquet"),
        ({"weight": 1.0}, "one of the keys paligemma, llava, parquet"),
        ({"paligemma": "a", "weight": 0}, "greater than 0"),
        ({"paligemma": "a", "question": "x"}, "Extra inputs are not permitted"),
        ({"llava": "a", "boxes": "metres"}, "'thousandths', 'pixels' or 'fractions'"),
    ],
)
def test_entries_that_are_none(entry: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        TypeAdapter(LanguageEntry).validate_python(entry)
