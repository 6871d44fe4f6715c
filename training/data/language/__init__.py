"""Vision-language data from files: PaliGemma's jsonl, conversations of LLaVA and Qwen-VL, parquet (docs/data.md)."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from training.data.language.llava import LlavaData, LlavaEntry, is_conversation
from training.data.language.paligemma import PaliGemmaData, PaliGemmaEntry
from training.data.language.parquet import ParquetData, ParquetEntry
from training.data.language.records import LanguageData
from training.data.language.rows import Rows

__all__ = [
    "LanguageData",
    "LanguageEntry",
    "LlavaEntry",
    "PaliGemmaEntry",
    "ParquetEntry",
    "Rows",
    "is_conversation",
    "open_language",
]

_KINDS = {"paligemma": PaliGemmaEntry, "llava": LlavaEntry, "parquet": ParquetEntry}


def _kind(entry: Any) -> str | None:
    """The key that says what a file is; None, which pydantic refuses with the keys that it expects, for none or two."""
    found = [kind for kind in _KINDS if (kind in entry if isinstance(entry, dict) else hasattr(entry, kind))]
    return f"<{found[0]}>" if len(found) == 1 else None


LanguageEntry = Annotated[
    Annotated[PaliGemmaEntry, Tag("<paligemma>")]
    | Annotated[LlavaEntry, Tag("<llava>")]
    | Annotated[ParquetEntry, Tag("<parquet>")],
    Discriminator(
        _kind,
        custom_error_type="language_entry",
        custom_error_message="Entry should have one of the keys paligemma, llava, parquet",
    ),
]


def open_language(entry: PaliGemmaEntry | LlavaEntry | ParquetEntry, size: int, look: bool = True) -> LanguageData:
    """The data set of an entry, with images of `size` x `size`.

    ConfigurationError if the file is none of its format or, with `look`, if its first samples are broken.
    """
    data: LanguageData
    if isinstance(entry, PaliGemmaEntry):
        data = PaliGemmaData(entry, size)
    else:
        data = LlavaData(entry, size) if isinstance(entry, LlavaEntry) else ParquetData(entry, size)
    if look:
        data.look()
    return data
