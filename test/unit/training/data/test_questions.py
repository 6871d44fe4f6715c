"""Vision-language samples say what is true about the scene, in words that the tokenizer knows."""

import numpy as np
import pytest
from support.vocabularies import demo_tokenizer

from training.data.simulated.questions import (
    COMBINATIONS,
    QUESTIONS,
    SeenObject,
    ask_caption,
    ask_colour,
    ask_count,
    ask_presence,
    ask_what,
    ask_where,
    draw_sample,
    location_text,
)
from training.tokens.prompt import localise

OBJECTS = [
    SeenObject("red", "cube", 0.8, 0.5),
    SeenObject("red", "ball", 0.1, 0.999),
    SeenObject("blue", "cube", 0.4, 0.0),
]


def test_location_is_row_then_column() -> None:
    assert location_text(OBJECTS[1]) == "<loc1022><loc0102>"


@pytest.mark.parametrize("seed", range(30))
def test_answers_are_true(seed: int) -> None:
    rng = np.random.default_rng(seed)
    where = ask_where(OBJECTS, rng)
    assert where.about is not None and where.answer == location_text(where.about)
    assert where.question == f"where is the {where.about.colour} {where.about.shape} ?"
    what = ask_what(OBJECTS, rng)
    assert what.about is not None and location_text(what.about) in what.question
    assert what.answer == f"{what.about.colour} {what.about.shape}"
    presence = ask_presence(OBJECTS, rng)
    named = any(f"a {item.colour} {item.shape} ?" in presence.question for item in OBJECTS)
    assert presence.answer == ("yes" if named else "no")
    assert (presence.about is not None) == named
    count = ask_count(OBJECTS, rng)
    colour = count.question.split()[2]
    assert int(count.answer) == sum(item.colour == colour for item in OBJECTS)
    colour_sample = ask_colour(OBJECTS, rng)
    assert colour_sample.question == "what colour is the ball ?"  # the only shape that occurs once
    assert colour_sample.answer == "red"


def test_caption_reads_from_left_to_right() -> None:
    assert ask_caption(OBJECTS, np.random.default_rng(0)).answer == "red ball , blue cube , red cube"


def test_colour_falls_back_to_where_when_no_shape_is_unique() -> None:
    pair = [SeenObject("red", "cube", 0.1, 0.1), SeenObject("blue", "cube", 0.5, 0.5)]
    assert ask_colour(pair, np.random.default_rng(0)).question.startswith("where is")


def test_every_question_and_answer_is_in_the_vocabulary() -> None:
    tokenizer = demo_tokenizer()
    rng = np.random.default_rng(0)
    unknown = tokenizer.token_to_id("<unk>")
    seen = set()
    for _ in range(400):
        kinds = rng.choice(len(COMBINATIONS), size=3, replace=False)
        objects = [SeenObject(*COMBINATIONS[kind], *rng.uniform(0, 1, 2)) for kind in kinds]
        sample = draw_sample(objects, rng)
        seen.add(sample.question.split()[0] + sample.question.split()[1])
        for text in (sample.question, sample.answer):
            assert unknown not in tokenizer.encode(localise(tokenizer, text)).ids, text
    assert len(seen) == len(QUESTIONS)
