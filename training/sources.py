"""What a configuration says of data, opened: data sets, robots with their statistics, vocabulary, sources of batches.

Everything about the data that can be wrong is found here, before the first step.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.bundle import PromptSpec
from ki_vla_ros.errors import ConfigurationError, InputError
from ki_vla_ros.files import read_json
from ki_vla_ros.policy import clean_instruction, tokenize
from ki_vla_ros.robot import Robot, find_robot, read_robot
from training.action_space import ActionSpace
from training.config import KINDS, Entry, LeRobotEntry, TrainingConfig
from training.data import (
    Augmentation,
    BatchForm,
    BatchMaker,
    Embodiment,
    Mixture,
    Part,
    Samples,
    draw_numbers,
    fit_fast,
    whole_chunks,
)
from training.data.language import LanguageData, open_language
from training.data.lerobot import SOURCE, Dataset, LeRobotSamples
from training.tokens import (
    ACTIONS,
    BEGIN,
    END,
    FIRST_SEGMENT,
    ActionTokenizer,
    FastTokenizer,
    NaiveTokenizer,
    act_query_ids,
    act_query_token,
    fast_ids,
    fast_token,
    load_actions,
    localise,
    make_vocabulary,
)
from training.weights import check_statistics, start_tokenizer

FIT_CHUNKS = 20_000  # chunks that FAST's merges are fitted on
UNCHANGED = Augmentation(brightness=0.0, contrast=0.0)
LEAST_EPISODES = 5  # of a dataset of which some are kept apart
LEAST_DRAWN = 0.1  # samples of a data set in a whole run, on average; with fewer, its weight is a mistake
SMALL = 1 << 20  # bytes of a file that is hashed whole for the fingerprint; of larger ones, the size counts


class Sources:
    """The data of one run. `training` and `held_out` have a mixture for each name of the configuration."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.warnings: list[str] = []  # to be told before the first step
        self.unseen: dict[str, list[str]] = {}  # cameras of each robot that none of its data has
        self.robots: dict[str, Robot] = {}  # by the name in the robot file, however the configuration names that
        self._files: dict[str, Path] = {}
        self._given: dict[str, Robot] = {}
        self._datasets: dict[Path, Dataset] = {}
        self._check_out()
        self._robot(config.robot)
        self._leave_out_cameras()
        self.robot = self._robot(config.robot)
        if config.max_prefix_delay >= self.robot.horizon:
            raise ConfigurationError(
                f"max_prefix_delay: expected less than the horizon {self.robot.horizon} of robot {self.robot.name!r}, "
                f"got {config.max_prefix_delay}"
            )
        self._opened = {
            name: [(entry, *self._open(name, entry)) for entry in entries] for name, entries in config.sources.items()
        }
        self._kept = {
            name: [(entry, self._open(name, entry)[0]) for entry in entries]
            for name, entries in config.held_out.items()
        }
        self._check_apart()
        self._check_weights()
        self.embodiments = self._fit()
        if without := [name for name in self.robots if name not in self.embodiments]:
            key = "robot" if without[0] == self.robot.name else "held_out"
            raise ConfigurationError(
                f"{key}: expected data of {without[0]!r} ({self._files[without[0]]}) to train on, got only that of "
                f"{', '.join(self.embodiments) or 'no robot'}; name a LeRobot dataset of it under sources"
            )
        self.actions = next(iter(self.embodiments.values())).actions
        # A fit may use fewer tokens than it is allowed; the model's size must not depend on that.
        fitted = config.action_tokens == "fast" and config.fast_published is None
        most = max(self.actions.vocab_size, config.fast_vocabulary if fitted else 0)
        self.action_ids = most if config.vocabulary.fast_ids == "own" else 0
        self.tokenizer = (
            make_vocabulary(config.vocabulary, self._texts(), self.action_ids, config.model.state == "special")
            if config.start is None
            else start_tokenizer(config.start, self.action_ids, config.model.state == "special")
        )
        self._check_fast_ids()
        self.form = self._make_form()
        try:
            self.maker = BatchMaker(self.tokenizer, self.form)
        except InputError as error:
            raise ConfigurationError(f"postfix: whole: {error}; take bare, or a vocabulary that has it") from error
        # What is held out looks as it does on the robot.
        self.plain = BatchMaker(self.tokenizer, replace(self.form, augmentation=UNCHANGED, cameras={}))
        self._check_texts()
        self.training = {
            name: self._mix([(entry, samples) for entry, samples, _ in opened], self.maker)
            for name, opened in self._opened.items()
        }
        self.held_out = {name: self._mix(kept, self.plain) for name, kept in self._kept.items()}
        for name, opened in self._opened.items():
            apart = [(entry, samples) for entry, _, samples in opened if samples is not None]
            if name not in self.held_out and apart:
                self.held_out[name] = self._mix(apart, self.plain)

    @property
    def embodiment(self) -> Embodiment:
        """Of the robot that the policy is for."""
        return self.embodiments[self.robot.name]

    @property
    def pad_to(self) -> int | None:
        """The common width of states and actions, where robots differ or model.width gives one; zeros fill it."""
        widths = {(len(robot.state), len(robot.actions)) for robot in self.robots.values()}
        widest, width = max(max(pair) for pair in widths), self.config.model.width
        if width is not None and width < widest:
            raise ConfigurationError(
                f"model.width: expected at least the {widest} dimensions of the widest robot, got {width}"
            )
        return width or (widest if len(widths) > 1 else None)

    @property
    def action_dim(self) -> int:
        return self.pad_to or len(self.robot.actions)

    @property
    def state_dim(self) -> int:
        return self.pad_to or len(self.robot.state)

    @property
    def robot_sources(self) -> list[str]:
        """The names under which there is data of robots."""
        return [name for name, entries in self.config.sources.items() if isinstance(entries[0], LeRobotEntry)]

    def fingerprint(self) -> str:
        """SHA-256 of names and sizes of all files, and of what small ones hold."""
        digest = hashlib.sha256()
        for name, entries in self.config.sources.items():
            for entry in entries:
                place = place_of(entry)
                for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
                    if path.is_file():
                        size = path.stat().st_size
                        digest.update(f"{name} {path.relative_to(place.parent)} {size}".encode())
                        digest.update(path.read_bytes() if size <= SMALL else b"")
        return digest.hexdigest()

    def summary(self) -> list[tuple[str, str, str, float, int, int, int]]:
        """Each data set: source, place, robot, weight, episodes, frames or samples, and how many of them are held out.

        Data under `held_out` has weight 0.
        """
        rows = []
        for name, opened in self._opened.items():
            for entry, samples, apart in opened:
                rows.append(self._row(name, entry, entry.weight, samples, apart))
        for name, kept in self._kept.items():
            rows += [self._row(name, entry, 0.0, None, samples) for entry, samples in kept]
        return rows

    def _row(
        self, name: str, entry: Entry, weight: float, samples: Samples | None, apart: Samples | None
    ) -> tuple[str, str, str, float, int, int, int]:
        robot = self._embodiment(entry).robot.name if isinstance(entry, LeRobotEntry) else ""
        both = [part for part in (samples, apart) if part is not None]
        episodes = sum(len(part.episodes) for part in both if isinstance(part, LeRobotSamples))
        counts = [0 if part is None else len(part) for part in (samples, apart)]
        return name, str(place_of(entry)), robot, weight, episodes, counts[0], counts[1]

    def passed_over(self) -> list[str]:
        """What is broken in vision-language data and was passed over, also by the processes that make batches."""
        opened = [samples for entries in self._opened.values() for _, samples, _ in entries]
        opened += [samples for kept in self._kept.values() for _, samples in kept]
        return [told for samples in opened if isinstance(samples, LanguageData) and (told := samples.told())]

    # --- opening

    def _robot(self, given: str | None) -> Robot:
        """The robot of a robot file, or of its name; None: the one that the policy is for."""
        given = given or self.config.robot
        if given not in self._given:
            path = find_robot(given)
            robot = read_robot(path)
            changes = {key: getattr(self.config, key) for key in ("horizon", "action_period_s")}
            robot = robot.model_copy(update={key: value for key, value in changes.items() if value is not None})
            # One file may be named in several ways, and is one robot; two robots must not have one name.
            known, file = self.robots.setdefault(robot.name, robot), self._files.setdefault(robot.name, path)
            if known != robot:
                raise ConfigurationError(
                    f"robot {robot.name!r}: expected one robot of this name, got {file} and another in {path}; give "
                    "one of them another name, or take one file for both"
                )
            first = next(iter(self.robots.values()))
            if robot.horizon != first.horizon:
                raise ConfigurationError(
                    f"horizon: expected one of all robots, got {robot.horizon} of {robot.name} ({path}) and "
                    f"{first.horizon} of {first.name}; set horizon"
                )
            self._given[given] = known
        return self._given[given]

    def _leave_out_cameras(self) -> None:
        """Optional cameras that none of a robot's data has are not its policy's: nobody teaches what they show."""
        seen: dict[str, set[str]] = {}
        for source, entries in chain(self.config.sources.items(), self.config.held_out.items()):
            for entry in entries:
                self._check_made(source, entry)
                if isinstance(entry, LeRobotEntry):
                    robot, features = self._robot(entry.robot), self._dataset(entry).info.features
                    has = {c.name for c in robot.cameras if not c.optional or c.key in features}
                    seen.setdefault(robot.name, set()).update(has)
        for name, has in seen.items():
            robot = self.robots[name]
            self.unseen[name] = [camera for camera in robot.camera_names if camera not in has]
            kept = tuple(camera for camera in robot.cameras if camera.name in has)
            self.robots[name] = robot.model_copy(update={"cameras": kept})
        self._given = {given: self.robots[robot.name] for given, robot in self._given.items()}

    def _check_made(self, source: str, entry: Entry) -> None:
        place = place_of(entry)
        if self.config.made_by is not None and not place.exists():
            raise ConfigurationError(
                f"source {source}: expected data in {place}, found none; it is made by: {self.config.made_by}"
            )

    def _dataset(self, entry: LeRobotEntry) -> Dataset:
        if entry.lerobot not in self._datasets:
            self._datasets[entry.lerobot] = Dataset(entry.lerobot)
        return self._datasets[entry.lerobot]

    def _check_out(self) -> None:
        """ConfigurationError if the run would write into its data, or into a file."""
        out = self.config.out.resolve()
        for entry in self._entries():
            place = place_of(entry).resolve()
            if out == place or place in out.parents:
                raise ConfigurationError(f"out: expected a folder apart from the data, got {out} in {place}")
        if out.exists() and not out.is_dir():
            raise ConfigurationError(f"out: expected a folder, got the file {out}")

    def _check_apart(self) -> None:
        """ConfigurationError for data that a source has twice, or that is trained on and held out."""
        kept = [(name, entry, samples) for name, kept in self._kept.items() for entry, samples in kept]
        kept += [(name, entry, apart) for name, opened in self._opened.items() for entry, _, apart in opened if apart]
        held_out = {item: name for name, entry, samples in kept for item in _items(entry, samples)}
        seen: set[tuple[str, Path, int]] = set()
        for name, opened in self._opened.items():
            for entry, samples, _ in opened:
                for place, episode in _items(entry, samples):
                    what = str(place) if episode < 0 else f"episode {episode} of {place}"
                    if (name, place, episode) in seen:
                        raise ConfigurationError(
                            f"sources.{name}: expected all data once, got {what} twice; raise its weight instead"
                        )
                    if (place, episode) in held_out:
                        raise ConfigurationError(
                            f"sources.{name}: expected nothing that is held out, got {what}, which is held out for "
                            f"{held_out[place, episode]}; choose episodes under sources and held_out that differ"
                        )
                    seen.add((name, place, episode))

    def _check_weights(self) -> None:
        """ConfigurationError for a data set of which the run would draw nothing."""
        for name, entries in self.config.sources.items():
            drawn = sum(stage.steps * stage.sources.get(name, 0) for stage in self.config.stages)
            weights = sum(entry.weight for entry in entries)
            for entry in entries:
                if drawn and drawn * entry.weight / weights < LEAST_DRAWN:
                    raise ConfigurationError(
                        f"sources.{name}: {place_of(entry)}: weight: expected enough for a sample in the run, got "
                        f"{entry.weight:g} of {weights:g} for {drawn} samples; raise it, or leave the data out"
                    )

    def _entries(self) -> Iterator[Entry]:
        for entries in (*self.config.sources.values(), *self.config.held_out.values()):
            yield from entries

    def _open(self, source: str, entry: Entry) -> tuple[Samples, Samples | None]:
        """The data set, and the part of it that is kept apart for figures, if any."""
        size = self.config.model.vision.image_size
        self._check_made(source, entry)
        if not isinstance(entry, LeRobotEntry):
            return open_language(entry, size), None
        entries = sum(isinstance(entry, LeRobotEntry) for entry in self._entries())
        dataset, robot = self._dataset(entry), self._robot(entry.robot)
        if entry.chunk is None and (dataset.folder / SOURCE).is_file():
            said = read_json(dataset.folder / SOURCE)
            if said.get("consecutive") is False:
                raise ConfigurationError(
                    f"source {source}, dataset {dataset.folder}: its frames do not follow each other in time "
                    f"({SOURCE}), so its actions in a row are no chunk; set chunk: {said.get('chunk')} at the entry"
                )
        first, end = entry.episodes or (0, None)
        if (end or first + 1) > len(dataset.episodes):
            raise ConfigurationError(
                f"source {source}, {entry.lerobot}: episodes: expected some of its {len(dataset.episodes)}, got "
                f"{[first, end]}"
            )
        chosen = [episode.index for episode in dataset.episodes][first:end]
        apart: list[int] = []
        if source not in self.config.held_out and len(chosen) >= LEAST_EPISODES and self.config.held_out_share:
            count = max(1, round(self.config.held_out_share * len(chosen)))
            apart = [chosen[i] for i in np.linspace(0, len(chosen) - 1, count + 2)[1:-1].astype(int)]

        def open_episodes(episodes: Sequence[int]) -> LeRobotSamples:
            samples = LeRobotSamples(
                dataset,
                robot,
                image_size=size,
                ends=entry.ends,
                chunk=entry.chunk,
                episodes=episodes,
                cache_bytes=int(self.config.cache_gb * 2**30 / entries),
            )
            if misfit := samples.ranges.misfit():
                raise ConfigurationError(f"source {source}, {samples.name}: {misfit}")
            return samples

        kept = sorted(set(chosen) - set(apart))
        return open_episodes(kept), open_episodes(apart) if apart else None

    def _fit(self) -> dict[str, Embodiment]:
        """Every robot's statistics from its own training data, and one FAST vocabulary for all of them."""
        config = self.config
        data: dict[str, list[Any]] = {}
        for opened in self._opened.values():
            for entry, samples, _ in opened:
                if isinstance(entry, LeRobotEntry):
                    data.setdefault(self._robot(entry.robot).name, []).append(samples)
        spaces, chunks = {}, []
        for name, of_robot in data.items():
            numbers = draw_numbers(of_robot, config.seed)
            spaces[name] = ActionSpace.fit(self.robots[name], numbers, config.normalization, config.state_range)
            if name == self.robot.name and config.start is not None and config.start.statistics == "keep":
                kept = check_statistics(config.start, self.robots[name])
                ranges = (kept.state.low, kept.state.high, kept.action.low, kept.action.high)
                spaces[name] = ActionSpace(self.robots[name], *ranges)
            if not numbers.known_NH.all(axis=1).any():
                names = ", ".join(samples.name for samples in of_robot)
                raise ConfigurationError(
                    f"robot {name!r}: expected episodes with the {self.robot.horizon} actions of a chunk, got only "
                    f"shorter ones in {names}; set a shorter horizon, or ends: hold"
                )
            chunks.append(whole_chunks(spaces[name], numbers, FIT_CHUNKS // len(data), config.seed))
        if not spaces:
            raise ConfigurationError("sources: expected a LeRobot dataset of the robot, got vision-language data alone")
        actions = self._kept_actions() or make_actions(config, chunks)
        return {name: Embodiment(space, actions) for name, space in spaces.items()}

    def _kept_actions(self) -> ActionTokenizer | None:
        """What the checkpoint writes actions with: where its statistics are kept, its tokens mean the same."""
        start = self.config.start
        if start is None or start.statistics != "keep" or not (file := start.checkpoint / ACTIONS).exists():
            return None
        kept = load_actions(file)
        kind = "naive" if isinstance(kept, NaiveTokenizer) else "fast"
        if kind != self.config.action_tokens:
            raise ConfigurationError(
                f"{file}: expected {self.config.action_tokens} tokens, as action_tokens says, got {kind}; say the "
                "same, or let the data give statistics and tokens (start.statistics: data)"
            )
        return kept

    def _texts(self) -> Iterator[str]:
        """All that training tokenizes, as it does; the words of the prompt itself among them."""
        yield re.sub(r"<[a-z_0-9]+>|[{](task|state)[}]", " ", self._template())
        if self.config.postfix == "whole":
            yield BEGIN + END
        for *_, text in self._named_texts():
            yield text

    def _named_texts(self) -> Iterator[tuple[str, Any, str]]:
        every = [(name, entry, s) for name, opened in self._opened.items() for entry, *both in opened for s in both]
        every += [(name, entry, s) for name, kept in self._kept.items() for entry, s in kept]
        for name, entry, samples in every:
            if samples is None:
                continue
            for text in samples.texts():
                if isinstance(entry, LeRobotEntry):
                    try:
                        text = clean_instruction(text, self.config.prompt.style)
                    except InputError as error:
                        raise ConfigurationError(
                            f"source {name}, {samples.name}: task {text!r}: {error}; give it words in the dataset's "
                            "meta/tasks, or leave its episodes out (episodes)"
                        ) from error
                yield name, samples, text

    def _check_texts(self) -> None:
        """ConfigurationError for a task that is no instruction, is too long for a prompt, or has unknown words."""
        robots, seen = set(self.robot_sources), set[str]()
        for name, samples, text in self._named_texts():
            if name in robots and text in seen:
                continue
            seen.update([text] if name in robots else [])
            try:
                if name in robots:
                    highest_S = np.ones(len(samples.robot.state))  # bins of as many digits as any
                    tokenize(self.tokenizer, self.maker.render(text, highest_S), self.form.prompt.length)
                else:
                    tokenize(self.tokenizer, localise(self.tokenizer, text), self.form.longest_text)
            except InputError as error:
                keys = "prompt.length" if name in robots else "prompt.longest_text"
                raise ConfigurationError(f"source {name}, {samples.name}: {error} (or raise {keys})") from error

    def _check_fast_ids(self) -> None:
        """ConfigurationError unless FAST's tokens have the ids that the configuration asks for, each one alone."""
        if self.config.vocabulary.fast_ids == "own":
            return
        given = "vocabulary.fast_ids: places"
        if self.tokenizer.token_to_id(fast_token(0)) is not None:
            raise ConfigurationError(
                f"{given}: expected a vocabulary without FAST tokens of its own, got {fast_token(0)}; leave fast_ids "
                "out, or import the weights with --action-ids 0"
            )
        if self.tokenizer.token_to_id(FIRST_SEGMENT) is None:
            raise ConfigurationError(f"{given}: expected PaliGemma's vocabulary, got one without {FIRST_SEGMENT}")
        taken = {int(i) for i in fast_ids(self.tokenizer)[: self.actions.vocab_size]}
        for name, samples, text in self._named_texts():
            encoding = self.tokenizer.encode(localise(self.tokenizer, text), add_special_tokens=False)
            shared = [token for token, i in zip(encoding.tokens, encoding.ids, strict=True) if i in taken]
            if shared:
                told = (
                    f"{given}: source {name}, {samples.name}: the text {text[:60]!r} has {shared[0]!r}, whose id is "
                    "also a FAST token's: the model cannot tell this place (or word) from an action"
                )
                if not self.config.vocabulary.share_places:
                    raise ConfigurationError(
                        f"{told}; expected no such texts, got one; give actions ids of their own (fast_ids: own), "
                        "leave the data out, or train all the same (share_places: true)"
                    )
                self.warnings.append(told)
                return

    def _template(self) -> str:
        queries = "".join(act_query_token(i) for i in range(self.config.vocabulary.queries))
        return self.config.prompt.text(self.config.model.state_in_prompt, self.config.postfix, queries)

    def _make_form(self) -> BatchForm:
        config, vision, hints = self.config, self.config.model.vision, self.config.hints
        cameras = {camera.name for robot in self.robots.values() for camera in robot.cameras}
        if unknown := sorted(config.augmentation.cameras.keys() - cameras):
            raise ConfigurationError(
                f"augmentation.cameras: expected some of {', '.join(sorted(cameras))}, got {', '.join(unknown)}"
            )
        return BatchForm(
            image_size=vision.image_size,
            grid=vision.image_size // vision.patch_size,
            horizon=self.robot.horizon,
            action_dim=self.action_dim,
            state_dim=self.state_dim,
            prompt=PromptSpec(template=self._template(), length=config.prompt.length, style=config.prompt.style),
            state=config.model.state,
            postfix=config.postfix,
            longest_text=config.prompt.longest_text,
            separator="\n" if config.vocabulary.kind == "paligemma" else "",
            asking=tuple(act_query_ids(self.tokenizer)[: hints.readout_frequencies] if hints else ()),
            readouts=hints.readout_frequencies if hints else 0,
            augmentation=config.augmentation,
            cameras=config.augmentation.cameras,
        )

    def held_out_parts(self, name: str, embodiment: Embodiment) -> list[int]:
        """The parts of a held-out mixture that are of this robot."""
        kept = self._kept.get(name) or [(entry, apart) for entry, _, apart in self._opened[name] if apart is not None]
        return [number for number, (entry, _) in enumerate(kept) if self._embodiment(entry) is embodiment]

    def _embodiment(self, entry: Entry) -> Embodiment:
        return self.embodiments[self._robot(entry.robot if isinstance(entry, LeRobotEntry) else None).name]

    def _mix(self, entries: Sequence[tuple[Entry, Samples]], maker: BatchMaker) -> Mixture:
        parts = [Part(samples, entry.weight) for entry, samples in entries]
        if not isinstance(entries[0][0], LeRobotEntry):
            return Mixture(parts, lambda _, samples, rng, __: maker.of_language(samples, rng))
        embodiments = [self._embodiment(entry) for entry, _ in entries]
        return Mixture(
            parts,
            lambda n, samples, rng, tokens: maker.of_robots([embodiments[i] for i in n], samples, rng, tokens),
        )


def place_of(entry: Entry) -> Path:
    """Where an entry has its data."""
    place: Path = next(getattr(entry, key) for key in KINDS if hasattr(entry, key))
    return place


def _items(entry: Entry, samples: Samples) -> Iterator[tuple[Path, int]]:
    """What is one thing to draw from: an episode of a dataset, or other data as a whole, as -1."""
    place = place_of(entry).resolve()
    yield from ((place, e.index) for e in samples.episodes) if isinstance(samples, LeRobotSamples) else [(place, -1)]


def make_actions(config: TrainingConfig, chunks: Sequence[NDArray[np.float64]]) -> ActionTokenizer:
    """What writes actions as tokens: naive, FAST as published, or FAST fitted on the chunks [N, H, D] of each robot."""
    if config.action_tokens == "naive":
        _, horizon, action_dim = chunks[0].shape
        if config.naive_stride > (most := max(1, horizon - 1)):
            raise ConfigurationError(
                f"naive_stride: expected at most {most}, with a horizon of {horizon}, got {config.naive_stride}"
            )
        return NaiveTokenizer(horizon, action_dim, config.naive_stride)
    if config.fast_published is None:
        return fit_fast(
            chunks,
            vocabulary=config.fast_vocabulary,
            scale=config.fast_scale,
            byte_level=config.fast_merges == "bytes",
            merged=config.fast_merged,
            ends=config.fast_merges == "none",
        )
    # For each robot, as a published vocabulary may be made for chunks of one shape alone.
    shapes = [chunk_NHD.shape[1:] for chunk_NHD in chunks]
    fast, *_ = [FastTokenizer.load_published(config.fast_published, *shape) for shape in shapes]
    return fast
