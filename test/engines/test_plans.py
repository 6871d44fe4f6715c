"""The cache of built engines: what is found again, what is built again, and what is refused."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from ki_vla_ros.bundle.folder import EXPERT, PREFILL, Bundle, load_bundle
from ki_vla_ros.engines import plans, tensorrt_builder
from ki_vla_ros.engines.plans import PlanCache, PlanKey, PlanRecord, check_trusted, default_folder
from ki_vla_ros.engines.tensorrt_builder import find_or_build, plan_key
from ki_vla_ros.engines.tensorrt_library import load_library
from ki_vla_ros.errors import ConfigurationError, EngineError
from ki_vla_ros.share import find_bundle

RTX = load_library("tensorrt_rtx")


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle(find_bundle("demo"))


@pytest.fixture
def cache(tmp_path: Path) -> PlanCache:
    return PlanCache(tmp_path / "engines")


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def fake_builds(monkeypatch: pytest.MonkeyPatch) -> list[PlanKey]:
    """Plans that take no time, and the keys that were built."""
    built: list[PlanKey] = []

    def build(bundle: Bundle, key: PlanKey, *_: object) -> memoryview:
        built.append(key)
        return memoryview(f"plan {len(built)} of {key.graph} for {key.gpu}".encode())

    monkeypatch.setattr(tensorrt_builder, "build_plan", build)
    return built


def test_a_plan_is_found_again_only_for_the_same_graph_version_and_gpu(
    bundle: Bundle, cache: PlanCache, said: list[str], fake_builds: list[PlanKey]
) -> None:
    key = plan_key(bundle, EXPERT, RTX, "sm89")
    variants = [
        key,
        *(key.model_copy(update={field: f"{getattr(key, field)}9"}) for field in ("version", "gpu", "library")),
        key.model_copy(update={"graph_sha256": "0" * 64}),
        plan_key(bundle, PREFILL, RTX, "sm89"),
    ]
    first = [bytes(find_or_build(bundle, variant, RTX, cache, said.append)) for variant in variants]
    assert fake_builds == variants and len(set(first)) == len(variants)
    assert [bytes(find_or_build(bundle, variant, RTX, cache, said.append)) for variant in variants] == first
    assert fake_builds == variants
    assert f"only for tensorrt_rtx {RTX.version} on sm89" in next(line for line in said if "on sm899" in line)


@pytest.mark.parametrize(
    "damage", ["cut", "changed", "no record", "no plan", "empty plan", "broken record", "old record"]
)
def test_damaged_plans_are_built_again(
    damage: str, bundle: Bundle, cache: PlanCache, said: list[str], fake_builds: list[PlanKey]
) -> None:
    key = plan_key(bundle, EXPERT, RTX, "sm89")
    find_or_build(bundle, key, RTX, cache, said.append)
    path = cache.path(key)
    record = path.with_name(path.name + ".json")
    content = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(content[:-1])
        case "changed":
            path.write_bytes(content[:-1] + b"?")
        case "empty plan":
            path.write_bytes(b"")
        case "no plan":
            path.unlink()
        case "no record":
            record.unlink()
        case "broken record":
            record.write_bytes(record.read_bytes()[:-20])
        case "old record":
            record.write_text(json.dumps(json.loads(record.read_text()) | {"further": 1}))
    assert cache.read(key) is None
    assert bytes(find_or_build(bundle, key, RTX, cache, said.append)).startswith(b"plan 2")
    assert bytes(find_or_build(bundle, key, RTX, cache, said.append)).startswith(b"plan 2")
    assert len(fake_builds) == 2 and ("a damaged engine" in said[-2]) == (damage != "no plan")


def test_a_plan_of_another_gpu_or_version_is_refused_by_name(
    bundle: Bundle, cache: PlanCache, said: list[str], fake_builds: list[PlanKey]
) -> None:
    """As when someone renames the files of one robot for the next."""
    key = plan_key(bundle, EXPERT, RTX, "sm89")
    other = key.model_copy(update={"gpu": "sm120", "version": "1.6.0"})
    find_or_build(bundle, other, RTX, cache, said.append)
    for path in (cache.path(other), cache.path(other).with_name(cache.path(other).name + ".json")):
        path.rename(path.with_name(path.name.replace(other.file_name, key.file_name)))
    with pytest.raises(
        EngineError, match=rf"for tensorrt_rtx {RTX.version} on sm89, got .* for tensorrt_rtx 1\.6\.0 on sm120"
    ):
        find_or_build(bundle, key, RTX, cache, said.append)


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_half_written_plan_is_never_seen(
    fails: str, bundle: Bundle, cache: PlanCache, said: list[str], fake_builds: list[PlanKey], monkeypatch: Any
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    key = plan_key(bundle, EXPERT, RTX, "sm89")
    with monkeypatch.context() as patch:
        patch.setattr(plans.os, fails, full)
        with pytest.raises(
            ConfigurationError, match="No space left on device; make room or choose another engine cache"
        ):
            find_or_build(bundle, key, RTX, cache, said.append)
    assert [path.name for path in cache.folder.iterdir()] == ["lock"]
    assert cache.read(key) is None


def test_a_new_plan_is_not_read_with_the_old_record(
    bundle: Bundle, cache: PlanCache, said: list[str], fake_builds: list[PlanKey], monkeypatch: Any
) -> None:
    """The machine loses power between the two files."""
    key = plan_key(bundle, EXPERT, RTX, "sm89")
    find_or_build(bundle, key, RTX, cache, said.append)
    cache.path(key).write_bytes(b"damaged")
    write_whole = plans._write_whole

    def only_the_plan(path: Path, content: Any) -> None:
        if path.suffix == ".json":
            raise KeyboardInterrupt
        write_whole(path, content)

    monkeypatch.setattr(plans, "_write_whole", only_the_plan)
    with pytest.raises(KeyboardInterrupt):
        find_or_build(bundle, key, RTX, cache, said.append)
    assert cache.path(key).exists() and cache.read(key) is None
    assert not cache.path(key).with_name(cache.path(key).name + ".json").exists()


def test_a_cache_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"engine cache: expected a folder to write to, got .*file/engines"):
        PlanCache(tmp_path / "file" / "engines")


def test_the_default_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/robot")
    assert default_folder() == Path("/var/robot/ki_vla_ros/engines")
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert default_folder() == Path.home() / ".cache/ki_vla_ros/engines"


def test_the_cache_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0o002)  # Ubuntu's
    try:
        PlanCache(tmp_path / "engines")
    finally:
        os.umask(before)
    assert (tmp_path / "engines").stat().st_mode & 0o777 == 0o755


def test_a_cache_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "engines"
    PlanCache(folder)
    for mode in (0o775, 0o757, 0o1777):
        folder.chmod(mode)
        with pytest.raises(
            ConfigurationError, match=r"expected it to be writable for you alone \(chmod go-w\), got drwx"
        ):
            PlanCache(folder)
    folder.chmod(0o755)
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(ConfigurationError, match=r"expected no symbolic link, got one to .*engines"):
        PlanCache(tmp_path / "link")


def test_an_engine_that_another_can_write_to_is_refused(bundle: Bundle, cache: PlanCache, tmp_path: Path) -> None:
    key = plan_key(bundle, EXPERT, RTX, "sm89")
    plan = memoryview(b"plan")
    digest = hashlib.sha256(plan).hexdigest()
    record = PlanRecord(**dict(key), plan_sha256=digest, size=4, created="now", build_s=1.0)
    path = cache.write(record, plan)
    assert cache.read(key) is not None
    for file in (path, path.with_name(f"{path.name}.json")):
        file.chmod(0o664)
        with pytest.raises(EngineError, match="cannot be trusted: expected it to be writable"):
            cache.read(key)
        file.chmod(0o644)
        moved = file.rename(tmp_path / "elsewhere")
        file.symlink_to(moved)
        with pytest.raises(EngineError, match="cannot be trusted: expected no symbolic link"):
            cache.read(key)
        file.unlink()
        moved.rename(file)
    path.unlink()
    os.mkfifo(path, 0o644)
    with pytest.raises(EngineError, match="cannot be trusted: expected a file, got a named pipe"):
        cache.read(key)


def test_a_cache_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plan").touch(mode=0o644)
    found = os.stat_result((0o100644, 0, 0, 1, 1234, 0, 0, 0, 0, 0))
    monkeypatch.setattr(Path, "lstat", lambda _: found)
    with pytest.raises(OSError, match="expected it to be yours, got one of user 1234"):
        check_trusted(tmp_path / "plan")
