"""The tokenizer in a bundle: its parts are those that this package writes or imports, and it must fit the manifest.

A tokenizer's file is nearly a program: patterns whose search never ends, replacements that double a text again and
again. And the library panics on some files and texts, with an exception that `except Exception` does not catch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from tokenizers import Encoding, Tokenizer

from ki_vla_ros.bundle.manifest import PAD_TOKEN, UNKNOWN_TOKEN, Manifest, state_bin_token
from ki_vla_ros.errors import BundleError, InstructionError
from ki_vla_ros.files import parse_json, read_file

Made = TypeVar("Made")
LARGEST_TOKENIZER: Final = 40 << 20  # Gemma 3's has 33 MB
LONGEST_REPLACEMENT: Final = 16
# The parts of a tokenizer and the types that each may have; a Sequence only where it is not run on the robot.
_TYPES: Final[dict[str, set[str]]] = {
    "model": {"BPE", "WordLevel"},
    "normalizer": {"Replace"},
    "pre_tokenizer": {"Split", "ByteLevel"},
    "post_processor": {"TemplateProcessing", "ByteLevel"},
    "decoder": {"Sequence", "Replace", "ByteFallback", "Fuse", "ByteLevel"},
}
# The patterns that this package writes (training/tokens/words.py); any other may take for ever.
_PATTERNS: Final = (r"\w+|[^\w\s]|\n",)


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a file; OSError or ValueError if it is none, or has parts that this package does not write."""
    return make_tokenizer(read_file(path, LARGEST_TOKENIZER))


def make_tokenizer(content: bytes) -> Tokenizer:
    """The same from a file's content."""
    description = parse_json(content, LARGEST_TOKENIZER)
    if not isinstance(description, dict):
        raise ValueError(f"expected a JSON object, got {type(description).__name__}")
    for part, types in _TYPES.items():
        if description.get(part) is not None:
            _check_part(part, description[part], types)
    return _guarded(lambda: Tokenizer.from_str(content.decode()), ValueError)


def encode(tokenizer: Tokenizer, text: str, special: bool = True) -> Encoding:
    """The text's tokens, with those that the tokenizer adds if `special`; InstructionError where the library fails."""
    return _guarded(
        lambda: tokenizer.encode(text, add_special_tokens=special),
        lambda error: InstructionError(f"prompt: expected text that the tokenizer reads, got {text[:80]!r}: {error}"),
    )


def _check_part(part: str, content: Any, types: set[str]) -> None:
    kind = content.get("type") if isinstance(content, dict) else None
    if not isinstance(kind, str) or kind not in types:
        raise ValueError(f"{part}: expected {' or '.join(sorted(types))}, got {str(kind)[:80]!r}")
    if kind == "Sequence":
        parts = content.get("decoders")
        if not isinstance(parts, list) or len(parts) > 8:
            raise ValueError(f"{part}: expected a few parts in a Sequence, got {str(parts)[:80]}")
        for inner in parts:
            _check_part(part, inner, types - {"Sequence"})
    if "pattern" in content:
        pattern = content["pattern"]
        text = pattern.get("String") if isinstance(pattern, dict) and len(pattern) == 1 else None
        known = [{"Regex": known} for known in _PATTERNS]
        if not (isinstance(text, str) and text) and pattern not in known:
            raise ValueError(f"{part}: expected a plain text or a pattern of this package, got {str(pattern)[:80]}")
    if len(str(content.get("content", ""))) > LONGEST_REPLACEMENT:
        raise ValueError(f"{part}: expected a short replacement, got {str(content['content'])[:80]!r}")
    if kind == "BPE" and content.get("dropout") not in (None, 0, 0.0):
        raise ValueError(f"{part}: expected the same tokens each time, got dropout {str(content['dropout'])[:80]}")


def _guarded(work: Callable[[], Made], refuse: Callable[[BaseException], Exception]) -> Made:
    """What `work` returns; what it raises becomes another exception, the library's panics too."""
    try:
        return work()
    except BaseException as error:  # the library raises bare Exception, and PanicException, which is none
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise refuse(error) from error


def read_tokenizer(path: Path, manifest: Manifest) -> Tokenizer:
    """The tokenizer of a bundle; BundleError unless it fits the manifest's prompt and vocabulary."""
    try:
        tokenizer = load_tokenizer(path)
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: expected a tokenizers file, got something else ({error}); export again") from error
    try:
        _check_fit(path, tokenizer, manifest)
    except InstructionError as error:
        raise BundleError(f"{path}: expected a tokenizer for the prompt, got one that fails ({error})") from error
    return tokenizer


def _check_fit(path: Path, tokenizer: Tokenizer, manifest: Manifest) -> None:
    prompt, vocab_size = manifest.prompt, manifest.graph.vocab_size
    if tokenizer.truncation is not None or tokenizer.padding is not None:
        raise BundleError(
            f"{path}: expected neither truncation nor padding, got {tokenizer.truncation or tokenizer.padding}; "
            "export again"
        )
    for token in (PAD_TOKEN, UNKNOWN_TOKEN, *re.findall(r"<[^<>\s]+>", prompt.template)):
        if tokenizer.token_to_id(token) is None:
            raise BundleError(f"{path}: expected the token {token} in the vocabulary, got none")
    word, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= vocab_size:
        raise BundleError(f"{path}: expected ids below {vocab_size} (graph.vocab_size), got {largest} for {word!r}")
    unknown_id = tokenizer.token_to_id(UNKNOWN_TOKEN)
    frame_text = prompt.template.replace("{task}", " ").replace("{state}", " ")
    frame = encode(tokenizer, frame_text)
    if unknown_id in frame.ids:
        start, end = frame.offsets[frame.ids.index(unknown_id)]
        raise BundleError(
            f"{path}: expected every token of prompt.template, got no {frame_text[start:end]!r} in the vocabulary"
        )
    needed = len(frame.ids) + 1
    special = manifest.state.encoding == "special"
    if special or (manifest.state.in_prompt and prompt.style == "words"):
        needed += len(manifest.robot.state)
        for word in ((state_bin_token if special else str)(i) for i in range(prompt.state_bins)):
            ids = encode(tokenizer, word, special=False).ids
            if len(ids) != 1 or ids[0] == unknown_id:
                raise BundleError(
                    f"{path}: expected a token for each state bin 0..{prompt.state_bins - 1}, got none for {word!r}"
                )
    elif manifest.state.in_prompt:
        # Each digit is a token here: count the longest bin for every joint.
        bins = [encode(tokenizer, f" {i}", special=False) for i in range(-1, prompt.state_bins)]
        needed += len(manifest.robot.state) * max(len(encoding.ids) for encoding in bins)
    if needed > prompt.length:
        raise BundleError(
            f"{path}: expected room for an instruction in prompt.length {prompt.length}, got a template that "
            f"needs {needed} tokens with a single word"
        )
