"""Reads a YAML file into a record, strictly: each key once, and only keys that the record knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from ki_vla_ros.errors import ConfigurationError, describe_validation

Record = TypeVar("Record", bound=BaseModel)


def read_yaml(path: Path, record: type[Record], what: str, examples: str) -> Record:
    """Read and check a file; `what` it is and the folder with `examples` of it are named in errors.

    ConfigurationError names the file, the key or line, what was expected and what was got.
    """
    cause: Exception
    try:
        return record.model_validate(yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader))
    except OSError as error:
        cause, fault = error, f"expected a YAML file, got one that cannot be read ({error.strerror})"
    except ValidationError as error:
        cause, fault = error, describe_validation(error)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        cause, fault = error, f"expected YAML, got something else ({_describe(error)})"
    raise ConfigurationError(f"{what} {path}: {fault}; {examples} has examples") from cause


def _describe(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return " ".join(str(error).split())


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, where PyYAML silently takes the last value."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        keys = set()
        for key, _ in node.value:
            if (name := (key.tag, str(key.value))) in keys:
                raise yaml.MarkedYAMLError(
                    problem=f"expected each key once, got {key.value!r} again", problem_mark=key.start_mark
                )
            keys.add(name)
        return node
