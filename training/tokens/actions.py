"""What writes chunks of actions as tokens, FAST or naive, and its file beside a policy's weights.

Tokens mean nothing without it: FAST's merges are fitted on a run's own chunks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import Field, TypeAdapter, ValidationError
from tokenizers import Tokenizer

from ki_vla_ros.bundle import make_tokenizer
from ki_vla_ros.errors import ConfigurationError, describe_validation
from ki_vla_ros.files import read_json
from ki_vla_ros.robot import Frozen
from training.tokens.fast import FIRST_CHARACTER, LARGEST, LAST_CHARACTER, SMALLEST, FastTokenizer
from training.tokens.naive import NaiveTokenizer

ActionTokenizer: TypeAlias = FastTokenizer | NaiveTokenizer

ACTIONS: Final = "actions.json"
Size = Annotated[int, Field(ge=1, le=1 << 20)]


class NaiveFile(Frozen):
    kind: Literal["naive"]
    horizon: Size
    action_dim: Size
    stride: Size

    def tokenizer(self) -> NaiveTokenizer:
        return NaiveTokenizer(self.horizon, self.action_dim, self.stride)


class FastFile(Frozen):
    kind: Literal["fast"]
    horizon: Size
    action_dim: Size
    scale: Annotated[float, Field(ge=SMALLEST, le=LARGEST)]
    lowest: Annotated[int, Field(ge=-LARGEST, le=LARGEST)]
    highest: Annotated[int, Field(ge=-LARGEST, le=LARGEST)]
    byte_level: bool
    ends: bool = False
    bpe: dict[str, Any]

    def tokenizer(self) -> FastTokenizer:
        """ValueError if the merges are of something else than these coefficients."""
        bpe: Tokenizer = make_tokenizer(json.dumps(self.bpe).encode())
        first, most = (0, LAST_CHARACTER) if self.byte_level else (FIRST_CHARACTER, LAST_CHARACTER - FIRST_CHARACTER)
        if not 0 <= self.highest - self.lowest <= most:
            raise ValueError(f"expected lowest to highest within {most}, got {self.lowest} to {self.highest}")
        letters = {ord(letter) - first for piece in bpe.get_vocab() for letter in piece}
        if not self.byte_level and not letters <= set(range(self.highest - self.lowest + 1)):
            raise ValueError(f"expected merges of the coefficients {self.lowest} to {self.highest}, got others")
        return FastTokenizer(
            self.horizon, self.action_dim, self.scale, self.lowest, self.highest, bpe, self.byte_level, self.ends
        )


_FILE: TypeAdapter[NaiveFile | FastFile] = TypeAdapter(Annotated[NaiveFile | FastFile, Field(discriminator="kind")])


def describe_actions(actions: ActionTokenizer) -> str:
    """As JSON; the same tokens have the same."""
    said: dict[str, Any] = {"horizon": actions.horizon, "action_dim": actions.action_dim}
    if isinstance(actions, NaiveTokenizer):
        said |= {"kind": "naive", "stride": actions.stride}
    else:
        said |= {name: getattr(actions, name) for name in ("scale", "lowest", "highest", "byte_level")}
        said |= {"ends": True} if actions.ends else {}
        said |= {"kind": "fast", "bpe": json.loads(actions.bpe.to_str())}
    return json.dumps(said, ensure_ascii=False) + "\n"


def load_actions(path: Path) -> ActionTokenizer:
    """What `describe_actions` wrote; ConfigurationError if the file holds something else."""
    try:
        return _FILE.validate_python(read_json(path)).tokenizer()
    except ValidationError as error:
        raise ConfigurationError(f"{path}: {describe_validation(error)}") from error
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path}: expected a policy's action tokens, got none ({error})") from error
