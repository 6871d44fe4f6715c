"""Every kind of file that we read: whole ones, ways to damage them, and the readers that must not mind.

A reader refuses a file with a `KiVlaError` of readable text, or reads it; anything else it raises is a fault.
"""

from __future__ import annotations

import io
import json
import random
import shutil
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from google.protobuf.message import DecodeError
from rosbags.rosbag2 import CompressionMode

from ki_vla_ros.bags import find_session, open_bag
from ki_vla_ros.bundle import MANIFEST, PREFILL, TIME, TOKENIZER, TimeTable, load_bundle, read_header, read_program
from ki_vla_ros.bundle.folder import file_sha256
from ki_vla_ros.engines.plans import PlanCache, PlanKey, PlanRecord
from ki_vla_ros.errors import InputError, KiVlaError
from ki_vla_ros.messages import decode
from ki_vla_ros.messages.decoding import BagMessage, camera_frame
from ki_vla_ros.policy import check_instruction
from ki_vla_ros.replay.latency import parse_latency
from ki_vla_ros.replay.recorded import read_tick
from ki_vla_ros.robot import read_robot
from ki_vla_ros.settings import load_settings, read_session
from support.bundles import params_file, write_test_bundle
from support.checkpoints import write_checkpoint
from support.damage import Damage, damage, damage_json, damage_onnx, damage_text, damage_zip
from support.foreign_datasets import SHAPES, build
from support.sample_bags import recording, write_bag, write_mcap
from support.sentencepieces import train
from training.config import load_config
from training.convert.__main__ import main as convert
from training.convert.playback import Recorded
from training.data.lerobot import SOURCE, Dataset
from training.export.formats import save_program
from training.model import paligemma_3b
from training.tokens import read_tokenizer
from training.weights import (
    RunState,
    check_published,
    find_weights,
    load_checkpoint,
    open_run,
    read_ranges,
    save_checkpoint,
    save_run,
)
from training.weights.checkpoints import read_policy
from training.weights.files import INDEX
from training.weights.foreign import spellings
from training.weights.lora import Adapter

ROOT = Path(__file__).resolve().parents[2]
INSTRUCTION = "touch the red cube"


@dataclass(frozen=True)
class Kind:
    """`file` is damaged in a folder that holds what else belongs to it; `read` gets that folder."""

    folder: Path
    file: str
    read: Callable[[Path], object]
    ways: Sequence[Damage] = (damage,)

    def damaged(self, chance: random.Random) -> bytes:
        content = (self.folder / self.file).read_bytes()
        ways = [damage, *self.ways] if len(self.ways) == 1 else self.ways
        return chance.choice(ways)(content, chance)


def make_kinds(folder: Path) -> dict[str, Kind]:
    """All kinds by name, with whole files in `folder`."""
    kinds = _bundle_kinds(folder) | _bag_kinds(folder) | _text_kinds(folder) | _training_kinds(folder)
    for name, kind in kinds.items():
        with redirect_stdout(io.StringIO()):
            try:
                kind.read(kind.folder)
            except KiVlaError as error:
                raise AssertionError(f"{name}: a whole file is refused: {error}") from error
    return kinds


# --- bundles


def _bundle_kinds(folder: Path) -> dict[str, Kind]:
    whole = write_test_bundle(folder / "bundle").path
    bundle = load_bundle(whole)
    save_program(torch.nn.Linear(3, 2).requires_grad_(False), {"x_t": torch.zeros(2, 3)}, whole.parent / "step.pt2")
    (folder / "pt2").mkdir()
    shutil.move(folder / "step.pt2", folder / "pt2" / "step.pt2")
    plans = folder / "plans"
    plans.mkdir(mode=0o755)
    key = PlanKey(graph=PREFILL, graph_sha256="0" * 64, library="tensorrt", version="10.0", gpu="sm89")
    record = PlanRecord(**dict(key), plan_sha256="0" * 64, size=4, created="now", build_s=1.0)
    PlanCache(plans).write(record, memoryview(b"plan"))

    def read_manifest(at: Path) -> None:
        load_bundle(at)

    def read_tokenizer_file(at: Path) -> None:
        with suppress(ValueError):  # a manifest that names the damaged file as it is
            manifest = json.loads((whole / MANIFEST).read_text())
            manifest["files"][TOKENIZER] = file_sha256(at / TOKENIZER)
            (at / MANIFEST).write_text(json.dumps(manifest))
        damaged = load_bundle(at)
        for text in (INSTRUCTION, "a" * 200, "touch " * 33, "\u202e\x1b[2J", "\ud83d\ude00" * 100):
            with suppress(InputError):
                check_instruction(damaged, text)

    return {
        "manifest": Kind(whole, MANIFEST, read_manifest, (damage_json, damage_text)),
        "onnx": Kind(whole, PREFILL, lambda at: read_onnx(at / PREFILL), (damage_onnx, damage_onnx, damage)),
        "npz": Kind(whole, TIME, lambda at: TimeTable(at / TIME, bundle.manifest.graph.modulation), (damage_zip,)),
        "pt2": Kind(folder / "pt2", "step.pt2", lambda at: read_pt2(at / "step.pt2"), (damage_zip, damage_zip, damage)),
        "tokenizer": Kind(whole, TOKENIZER, read_tokenizer_file, (damage_json, damage_json, damage_text, damage)),
        "plan": Kind(plans, f"{key.file_name}.json", lambda at: read_plan(at, key), (damage_json,)),
    }


def read_plan(folder: Path, key: PlanKey) -> None:
    cache = PlanCache(folder)
    cache.read(key)
    cache.others(key)


def read_pt2(path: Path) -> None:
    program = read_program(path)
    for name in program.weights:
        program.read_weight(name)


def read_onnx(path: Path) -> None:
    """What our check accepts must be the graph that the protobuf library and onnxruntime see."""
    header = read_header(path)
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except DecodeError as error:
        raise AssertionError(f"accepted, but no protobuf: {error}") from error
    graph = model.graph
    external = {
        entry.value
        for tensor in (*graph.initializer, *_tensors(graph.node))
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert external == header.external_files, (external, header.external_files)
    assert {tensor.name for tensor in graph.initializer} <= header.weights.keys()
    for values, ours in ((graph.input, header.inputs), (graph.output, header.outputs)):
        assert [value.name for value in values] == list(ours)
        for value in values:
            shape = [dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim]
            sizes = [size if isinstance(size, int) else None for size in ours[value.name].shape]
            assert [None if size is None else size % (1 << 64) for size in shape] == sizes, (shape, sizes)
    domains = {node.domain for node in graph.node} - {"", "ai.onnx"}
    assert domains == header.foreign_domains, (domains, header.foreign_domains)
    assert not (model.functions or model.training_info or graph.sparse_initializer)
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no base but this
        assert "nowhere.bin" not in str(error) or "nowhere.bin" in header.external_files, error
        return
    assert sorted(value.name for value in session.get_inputs()) == sorted(header.inputs)
    assert sorted(value.name for value in session.get_outputs()) == sorted(header.outputs)
    for value in session.get_inputs():  # of an output it says what it has inferred
        ours = header.inputs[value.name]
        assert tuple(value.shape) == ours.shape or not all(isinstance(size, int) for size in ours.shape), value


def _tensors(nodes: Sequence[onnx.NodeProto]) -> list[onnx.TensorProto]:
    found = []
    for node in nodes:
        for attribute in node.attribute:
            found += [attribute.t, *attribute.tensors]
            for graph in (attribute.g, *attribute.graphs):
                found += [*graph.initializer, *_tensors(graph.node)]
    return found


# --- bags


def _bag_kinds(folder: Path) -> dict[str, Kind]:
    small, kinds = recording(seconds=0.2), {}
    for name, compression, per_chunk in (("zstd", "zstd", 20), ("plain", "", 20), ("loose", "zstd", 0)):
        (folder / name).mkdir()
        write_mcap(folder / name / "b.mcap", small, compression, per_chunk=per_chunk)
        kinds[f"mcap {name}"] = Kind(folder / name, "b.mcap", lambda at: read_bag(at / "b.mcap"))
    jpegs = folder / "jpegs"
    jpegs.mkdir()
    write_mcap(jpegs / "b.mcap", recording(seconds=0.1, transport="compressed"), "", per_chunk=0)
    kinds["mcap jpegs"] = Kind(jpegs, "b.mcap", lambda at: read_bag(at / "b.mcap"))
    for name, storage, packing in (("sqlite", "sqlite3", None), ("packed", "mcap", CompressionMode.FILE)):
        bag = write_bag(folder / name, small, storage, packing)
        file = next(file.name for file in bag.iterdir() if file.name != "metadata.yaml")
        kinds[name] = Kind(bag, file, read_bag)
    kinds["metadata"] = Kind(folder / "sqlite", "metadata.yaml", read_bag, (damage_text,))
    return kinds


def read_bag(path: Path) -> None:
    """Reading yields only messages, in order, and faults; decoding them raises only InputError."""
    with open_bag(path) as bag:
        last_ns = 0
        for found in bag.messages():
            assert found.log_ns >= last_ns
            last_ns = found.log_ns
            _decode(found)
        with suppress(KiVlaError):
            find_session(bag)
        for fault in bag.faults:
            assert str(fault).isprintable(), repr(str(fault))


def _decode(message: BagMessage) -> None:
    with suppress(InputError):
        if "Image" in message.type:
            camera_frame(message, "scene")
        else:
            decode(message)


# --- text


def _text_kinds(folder: Path) -> dict[str, Kind]:
    texts = folder / "texts"
    texts.mkdir()
    shutil.copy(ROOT / "config" / "robots" / "demo_arm.yaml", texts / "robot_file.yaml")
    shutil.copy(ROOT / "config" / "training" / "demo.yaml", texts / "training.yaml")
    shutil.copy(ROOT / "config" / "demo.yaml", texts / "params.yaml")
    (folder / "json_params").mkdir()
    params_file(folder / "json_params")
    (texts / "latency.json").write_text(json.dumps({"timing": {"latency_s": [0.01, 0.02]}}))
    tick = {"stamp_ns": 5, "chunk_index": 1, "frame_ns": {"scene": 4}, "joint_ns": [1, 2], "joined_ns": 7}
    (texts / "tick.json").write_text(json.dumps(tick | {"instruction": "x", "hold": None, "stage_ms": {"total": 3.0}}))
    topics = dict.fromkeys(("joint_states", "instruction", "command", "chunk", "tick"), "/a/b")
    session = {"node": "/policy", "bundle": {"name": "demo", "manifest_sha256": "0"}, "parameters": {"rate_hz": 10.0}}
    (texts / "session.json").write_text(json.dumps(session | {"topics": topics | {"cameras": {"scene": "/c"}}}))

    def kind(name: str, read: Callable[[Path], object], *ways: Damage) -> Kind:
        return Kind(texts, name, lambda at: read(at / name), ways)

    def text(path: Path) -> str:
        return path.read_bytes().decode(errors="replace")  # as it comes out of a message

    return {
        "robot file": kind("robot_file.yaml", read_robot, damage_text),
        "training YAML": kind("training.yaml", load_config, damage_text),
        "parameters": kind("params.yaml", load_settings, damage_text),
        "parameters as JSON": Kind(
            folder / "json_params", "robot.yaml", lambda at: load_settings(at / "robot.yaml"), (damage_json,)
        ),
        "latency": kind("latency.json", lambda path: parse_latency(str(path)), damage_json),
        "tick": kind("tick.json", lambda path: read_tick(text(path)), damage_json),
        "session": kind("session.json", lambda path: read_session(text(path)).settings, damage_json),
    }


# --- training


def _training_kinds(folder: Path) -> dict[str, Kind]:
    dataset = folder / "dataset"
    bag = write_bag(folder / "converted", recording(seconds=0.8))
    given = ["from-bag", bag, "--fps", 10, "--actions", "states", "--out", dataset, "--bundle", "demo"]
    with redirect_stdout(io.StringIO()):
        assert convert(list(map(str, given))) == 0
    files = {path.suffix + path.parent.parent.name: path for path in sorted(dataset.rglob("*")) if path.is_file()}
    inside = {
        "dataset info": ("meta/info.json", damage_json),
        "dataset source": ("meta/ki_vla_ros.json", damage_json),
        "dataset tasks": ("meta/tasks.parquet", damage),
        "dataset episodes": (str(files[".parquetepisodes"].relative_to(dataset)), damage),
        "dataset frames": (str(files[".parquetdata"].relative_to(dataset)), damage),
        "dataset video": (str(next(dataset.rglob("*.mp4")).relative_to(dataset)), damage),
    }
    kinds = {name: Kind(dataset, file, read_dataset, (way,)) for name, (file, way) in inside.items()}
    foreign = build(folder / "foreign", replace(SHAPES["xarm v2.0"], lengths={0: 3}))
    inside = {
        "foreign dataset info": ("meta/info.json", damage_json),
        "foreign dataset tasks": ("meta/tasks.jsonl", damage_json),
        "foreign dataset episodes": ("meta/episodes.jsonl", damage_json),
        "foreign dataset images": ("data/chunk-000/episode_000000.parquet", damage),
    }
    kinds |= {name: Kind(foreign, file, read_dataset, (way,)) for name, (file, way) in inside.items()}
    ranges = lambda at: read_ranges(at / "stats.json", "mean_std", 7, 7)  # noqa: E731
    kinds["statistics"] = Kind(dataset / "meta", "stats.json", ranges, (damage_json,))

    checkpoint = write_checkpoint(folder / "checkpoint", "text")
    model, resumed = load_checkpoint(checkpoint), folder / "resumed"
    save_checkpoint(resumed, model)
    kinds["checkpoint config"] = Kind(resumed, "config.json", load_checkpoint, (damage_json,))
    kinds["checkpoint weights"] = Kind(resumed, "weights.safetensors", load_checkpoint)
    save_run(folder / "run", RunState(step=1, made_of={"a": 1}), {"model.a": torch.zeros(3)}, keep=1)
    saved = folder / "run" / "checkpoint-000001"
    kinds["run state"] = Kind(saved, "state.json", open_run, (damage_json,))
    kinds["run pieces"] = Kind(saved, "part-00001-of-00001.safetensors", open_run)
    kinds["policy"] = Kind(checkpoint, "policy.json", lambda at: read_policy(at / "policy.json"), (damage_json,))

    shards = folder / "shards"
    shards.mkdir()
    names = list(model.state_dict())
    from safetensors.numpy import save_file

    for shard in ("a.safetensors", "b.safetensors"):
        save_file({f"{shard}.{name}": np.zeros(3, dtype=np.float32) for name in names[:5]}, shards / shard)
    listed = {f"{shard}.{name}": shard for shard in ("a.safetensors", "b.safetensors") for name in names[:5]}
    (shards / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    kinds["weights index"] = Kind(shards, INDEX, read_weights, (damage_json,))
    kinds["weights"] = Kind(shards, "a.safetensors", read_weights)

    kinds |= _published_kinds(folder / "published")

    pieces = train()
    (folder / "pieces").mkdir()
    (folder / "pieces" / "p.model").write_bytes(pieces.SerializeToString())
    size = len(pieces.pieces)
    tokenizer = read_tokenizer(folder / "pieces" / "p.model", 4, size)
    tokenizer.save(str(folder / "pieces" / "p.json"))
    kinds["sentencepiece"] = Kind(folder / "pieces", "p.model", lambda at: read_tokenizer(at / "p.model", 4, size))
    kinds["tokenizer to import"] = Kind(
        folder / "pieces", "p.json", lambda at: read_tokenizer(at / "p.json", 4, size), (damage_json,)
    )
    return kinds


def _published_kinds(folder: Path) -> dict[str, Kind]:
    """What others publish beside weights of pi0.5, and a LoRA adapter."""
    from safetensors.numpy import save_file

    folder.mkdir()
    robot, expected = read_robot(ROOT / "config" / "robots" / "libero.yaml"), paligemma_3b("pi05", horizon=10)
    modes = {"STATE": "QUANTILES", "ACTION": "QUANTILES"}
    features = {"observation.images.image": {"type": "VISUAL", "shape": [3, 256, 256]}}
    features |= {"observation.images.image2": {"type": "VISUAL", "shape": [3, 256, 256]}}
    config = {"type": "pi05", "chunk_size": 10, "normalization_mapping": modes, "input_features": features}
    (folder / "config.json").write_text(json.dumps(config | {"paligemma_variant": "gemma_2b"}))
    ends = {"observation.state": (8, {"q01": 0, "q99": 1}), "action": (7, {"q01": -1, "q99": 1})}
    statistics = {
        f"{what}.{name}": np.full(width, end, dtype=np.float32)
        for what, (width, fields) in ends.items()
        for name, end in fields.items()
    }
    save_file(statistics, folder / "stats.safetensors")
    normalizer = {"config": {"norm_map": modes, "eps": 1e-8}, "state_file": "stats.safetensors"}
    before = [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": {"a": "b"}}},
        {"registry_name": "relative_actions_processor", "config": {"enabled": False}},
        {"registry_name": "normalizer_processor"} | normalizer,
    ]
    after = [{"registry_name": "unnormalizer_processor"} | normalizer]
    for name, steps in (("policy_preprocessor.json", before), ("policy_postprocessor.json", after)):
        (folder / name).write_text(json.dumps({"name": name, "steps": steps}))
    factors = {
        f"base_model.model.model.state_proj.lora_{name}.weight": np.ones((2, 2), dtype=np.float32) for name in "AB"
    }
    save_file(factors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "rank_pattern": {},
        "alpha_pattern": {"x": 3},
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))

    def published(at: Path) -> None:
        check_published(at, "pi05", expected, robot, at / "stats.safetensors", "quantiles")

    def adapter(at: Path) -> None:
        found = Adapter(at, spellings)
        found.check({"state_proj.weight": (2, 2)})
        found.merge("state_proj.weight", torch.zeros(2, 2))

    published(folder)
    adapter(folder)
    names = ("config.json", "policy_preprocessor.json", "policy_postprocessor.json")
    return {
        **{f"published {name}": Kind(folder, name, published, (damage_json,)) for name in names},
        "published statistics": Kind(folder, "stats.safetensors", published),
        "adapter config": Kind(folder, "adapter_config.json", adapter, (damage_json,)),
        "adapter": Kind(folder, "adapter_model.safetensors", adapter),
    }


def read_weights(folder: Path) -> None:
    weights = find_weights(folder)
    for key in weights.shapes:
        weights.get(key)


def read_dataset(folder: Path) -> None:
    dataset = Dataset(folder)
    if (folder / SOURCE).exists():  # else only a robot file says whose it is
        Recorded.of(dataset)
    for episode in dataset.episodes:
        dataset.task_of(dataset.columns(episode))
        for camera in dataset.cameras:
            for _ in dataset.images(episode, camera):
                pass
