"""The comparison: which runs there are, that arms differ in their recipe alone, resumption, and the page."""

from __future__ import annotations

import shutil
import xml.etree.ElementTree as xml
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from support import ROOT
from support.ablations import write_tiny
from support.slider import Slider

from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.robot import find_robot, read_robot
from training import ablate
from training.ablation import load_ablation, measures, plan, trial, write_bench, write_report
from training.ablation.config import ClosedLoop
from training.ablation.plan import (
    Job,
    choose_rate,
    find_jobs,
    made_of,
    ready,
    start_config,
    start_made_of,
    training_config,
)
from training.model import VLA, Sampler
from training.recipe import recipe_names
from training.results import check_result, read_result, result_path, write_result
from training.run import Run
from training.tokens import fast_ids
from training.train import Trainer

KNOWN = {"pointing": {"right": 0.99, "loss": 0.1}, "vqa": {"right": 0.5, "loss": 1.0}}
START = {"weights": "w", "data": "d", "knowledge": KNOWN}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison whose common start has been made."""
    path = write_tiny(tmp_path_factory.mktemp("ablation"))
    config = load_ablation(path)
    trial.run_job(config, Job("start"), None)
    return path


def changed(path: Path, **changes: Any) -> Path:
    """The same comparison with other keys, and results of its own."""
    folder = path.parent / "-".join(changes)
    content = (
        yaml.safe_load(path.read_text()) | {"results": str(folder / "results"), "out": str(folder / "out")} | changes
    )
    other = path.parent / f"changed-{'-'.join(changes)}.yaml"
    other.write_text(yaml.safe_dump(content))
    return other


# --- what is measured


def test_gradients_are_of_every_loss_of_tokens(tiny: Path) -> None:
    """Where robot data alone is drawn, one cross-entropy over words and FAST is FAST's."""
    path = changed(tiny, arms={"ki": {}})
    run = Run(training_config(load_ablation(path), Job("run", "ki")))
    with torch.no_grad():
        for parameter in run.model.parameters():  # an expert that is new has its gates closed
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    [stage] = run.config.stages
    found = []
    for losses in ({"fast": 1.0, "flow": 1.0}, {"tokens": 1.0, "flow": 1.0}):
        alone = stage.model_copy(update={"losses": losses, "sources": {"robot": 4}})
        run.config = run.trainer.config = run.config.model_copy(update={"stages": (alone,)})
        found.append(measures.gradients(run))
    assert found[0] == pytest.approx(found[1])
    assert found[0].keys() == {"tokens", "flow", "cosine"} and min(found[0]["tokens"], found[0]["flow"]) > 0
    assert abs(found[0]["cosine"]) < 1


def test_frames_that_no_chunk_begins_with_are_no_chunks_of_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = [torch.tensor([[True, True, True], [False] * 3]), None, torch.tensor([[True, False, False]])]
    monkeypatch.setattr(measures, "robot_batches", lambda run: [SimpleNamespace(fast_mask_BT=mask) for mask in masks])
    assert measures.token_counts(None) == 2.0  # type: ignore[arg-type]


def test_where_tokens_see_noisy_actions_their_gradients_are_measured_so(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(training_config(load_ablation(changed(tiny, arms={"hybrid_mask": {}})), Job("run", "hybrid_mask")))
    read, calls = VLA._read_after_actions, list[int]()
    monkeypatch.setattr(VLA, "_read_after_actions", lambda *given: calls.append(1) or read(*given))
    found = measures.gradients(run)
    assert len(calls) == measures.GRADIENT_BATCHES and found["tokens"] > 0


# --- the arms


def first_step(path: Path, recipe: str, seed: int = 0) -> tuple[Run, Any, Any]:
    """A run of the recipe, its first robot batch, and the noise and times that it draws for that."""
    run = Run(training_config(load_ablation(path), Job("run", recipe, seed)))
    stage = run.config.stages[0]
    batch = run.trainer.draw(0, stage, 0)[0]
    with_flow = stage.model_copy(update={"losses": {"flow": 1.0}})
    [piece] = run.trainer.losses.split(batch, with_flow, np.random.default_rng([seed, 0, 0, 0]))
    return run, batch, piece.flow_rows


@pytest.mark.slow
def test_every_recipe_has_the_same_samples_noise_and_new_weights(tiny: Path) -> None:
    """Of one seed, in the first stage; of another seed none of them are the same."""
    names = recipe_names()
    path = changed(tiny, arms={name: {"seeds": 2} for name in names})
    run, batch, flow = first_step(path, "ki")
    ours = run.model.state_dict()
    for name in names:
        other, other_batch, other_flow = first_step(path, name)
        for key in ("images_BVCHW", "action_BHA", "state_BS", "known_BH"):
            assert torch.equal(getattr(batch, key), getattr(other_batch, key)), (name, key)
        assert torch.equal(flow.x_t_RHA, other_flow.x_t_RHA) and torch.equal(flow.time_RH, other_flow.time_RH), name
        theirs = other.model.state_dict()
        common = [key for key in ours.keys() & theirs.keys() if ours[key].shape == theirs[key].shape]
        assert name.startswith(("oft", "transfusion")) or any(key.startswith("expert.layers") for key in common), name
        differ = {key for key in common if not torch.equal(ours[key], theirs[key])}
        if name.startswith("ki_naive_tokens"):  # other tokens mean other things
            differ -= {"backbone.embedding.weight"}
            words = np.setdiff1d(np.arange(len(ours["backbone.embedding.weight"])), fast_ids(run.data.tokenizer))
            assert torch.equal(*(weights["backbone.embedding.weight"][words] for weights in (ours, theirs))), name
        assert not differ, name
    again, again_batch, again_flow = first_step(path, "ki", seed=1)
    assert not torch.equal(batch.action_BHA, again_batch.action_BHA)
    assert not torch.equal(flow.x_t_RHA, again_flow.x_t_RHA)
    assert not torch.equal(ours["action_in.weight"], again.model.state_dict()["action_in.weight"])
    assert torch.equal(ours["backbone.embedding.weight"], again.model.state_dict()["backbone.embedding.weight"])


def test_tokens_of_actions_begin_in_the_order_of_what_they_stand_for(tiny: Path) -> None:
    """Whatever an arm writes actions with: the start has never written any."""
    path = changed(tiny, arms={"ki": {}, "ki_naive_tokens": {}})
    config = load_ablation(path)
    for arm in config.arms:
        run = Run(training_config(config, Job("run", arm)))
        integers = [run.data.actions.integers(token) for token in range(run.data.actions.vocab_size)]
        alone = sorted((found[0], token) for token, found in enumerate(integers) if len(found) == 1)
        rows = run.model.backbone.embedding.weight.detach()[fast_ids(run.data.tokenizer)[[token for _, token in alone]]]
        unit = torch.nn.functional.normalize(rows, dim=1)
        near, far = ((unit[apart:] * unit[:-apart]).sum(dim=1) for apart in (1, 4))
        assert float(near.max() - near.min()) < 1e-4 and float(near.min() - far.max()) > 0.1, arm


def test_an_arm_is_its_recipe_over_the_common_run(tiny: Path) -> None:
    config = load_ablation(tiny)
    ki = training_config(config, Job("run", "ki", 1, 3e-3))
    [stage] = ki.stages
    assert (stage.steps, stage.learning_rate, stage.checkpoint_every) == (4, 3e-3, 2)
    assert (stage.insulate, set(stage.losses), set(stage.sources)) == (
        True,
        {"tokens", "flow"},
        {"robot", "scenes"},
    )
    assert ki.seed == 1 and ki.start is not None and ki.start.parts == ("vision", "backbone")
    pi0 = training_config(config, Job("run", "pi0"))
    assert set(pi0.stages[0].sources) == {"robot"} and not pi0.stages[0].insulate
    assert training_config(config, Job("grid", "ki", 100, 1e-2)).stages[0].steps == 2


@pytest.mark.parametrize("path", sorted((ROOT / "config/ablation").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_comparisons_of_this_repository_are_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every arm, one with three runs where ki has three; the rest of config/ablation/ is what they name."""
    if "arms:" not in path.read_text():
        return
    monkeypatch.chdir(ROOT)
    config = load_ablation(path)
    for arm in config.arms:
        run = training_config(config, Job("run", arm))
        assert run.model.backbone == start_config(config).model.backbone
        assert next(iter(run.stages[0].sources)) == "robot", arm
    assert {arm.recipe or name for name, arm in config.arms.items()} <= set(recipe_names())


# --- the plan


def write_grid(path: Path, errors: Mapping[float, float | None], arm: str = "ki") -> None:
    config = load_ablation(path)
    for rate, error in errors.items():
        job = Job("grid", arm, 100, rate)
        write_result(result_path(config.results, job.name), made_of(config, job, START), {"error": error})


def write_start(path: Path, **changes: Any) -> None:
    config = load_ablation(path)
    write_result(result_path(config.results, "start"), start_made_of(config), START | changes)


def test_runs_come_start_first_then_arm_by_arm_and_seed_by_seed(tiny: Path) -> None:
    path = changed(tiny, steps=4)
    config = load_ablation(path)
    jobs = find_jobs(config)
    assert [job.name for job in jobs] == [
        "start", "grid/ki-0.001", "grid/ki-0.01", "ki-0", "grid/pi0-0.001", "grid/pi0-0.01", "pi0-0", "ki-1", "timing",
    ]  # fmt: skip
    assert ready(config, jobs) == ([], [Job("start")])
    write_start(path)
    done, now = ready(config, jobs)
    assert [job.name for job in done] == ["start"]
    grids = [job.name for job in jobs if job.kind == "grid"]
    assert [job.name for job in now] == [*grids, "timing"], "no run without its rate"
    write_grid(path, {1e-3: 0.2, 1e-2: 0.1})
    done, now = ready(config, jobs)
    assert [job.name for job in now] == ["ki-0", "grid/pi0-0.001", "grid/pi0-0.01", "ki-1", "timing"]
    assert {job.rate for job in now if job.arm == "ki"} == {1e-2}
    assert [job.name for job in find_jobs(config, ["pi0"])] == ["start", "grid/pi0-0.001", "grid/pi0-0.01", "pi0-0"]
    with pytest.raises(ConfigurationError, match="--arms: expected some of ki, pi0, got pi1"):
        find_jobs(config, ["pi1"])


@pytest.mark.parametrize(
    ("errors", "chosen"),
    [
        ({1e-3: 0.2, 1e-2: 0.1}, 1e-2),
        ({1e-3: 0.1, 1e-2: 0.2}, 1e-3),
        ({1e-3: 0.1, 1e-2: 0.1}, 1e-3),
        ({1e-3: 0.3, 1e-2: None}, 1e-3),
        ({1e-3: 0.3}, None),
    ],
    ids=["larger", "smaller", "tie", "diverged", "unfinished"],
)
def test_the_rate_with_the_smallest_error_is_taken(
    errors: dict[float, float | None], chosen: float | None, tiny: Path, tmp_path: Path
) -> None:
    path = changed(tiny, results=str(tmp_path))
    write_grid(path, errors)
    assert choose_rate(load_ablation(path), "ki", START) == chosen


def test_an_arm_that_learns_with_no_rate_is_named(tiny: Path, tmp_path: Path) -> None:
    path = changed(tiny, results=str(tmp_path))
    write_grid(path, {1e-3: None, 1e-2: None})
    with pytest.raises(ConfigurationError, match=r"arm ki: expected a learning rate .* got none of 0\.001, 0\.01"):
        choose_rate(load_ablation(path), "ki", START)


def test_nothing_grows_on_a_start_that_knows_too_little(tiny: Path, tmp_path: Path) -> None:
    knowledge = yaml.safe_load(tiny.read_text())["knowledge"] | {"gates": {"pointing": 0.95, "vqa": 0.4}}
    path = changed(tiny, results=str(tmp_path), knowledge=knowledge)
    config = load_ablation(path)
    write_start(path)
    assert len(ready(config, find_jobs(config))[1]) == 5
    write_start(path, knowledge={"pointing": {"right": 0.9}, "vqa": {"right": 0.5}})
    with pytest.raises(ConfigurationError, match=r"the common start: expected pointing at least 0.95, got 0.9"):
        ready(config, find_jobs(config))


def test_a_result_of_another_configuration_is_refused_and_says_what_differs(tiny: Path, tmp_path: Path) -> None:
    path = changed(tiny, results=str(tmp_path))
    write_start(path)
    write_grid(path, {1e-3: 0.2, 1e-2: 0.1})
    other = changed(path, grid={"rates": [1e-3, 1e-2], "steps": 3, "seed": 100}, results=str(tmp_path))
    config = load_ablation(other)
    with pytest.raises(ConfigurationError, match=r"grid/ki-0.001.json: .*run.stages.0.steps: expected 3, got 2.*move"):
        ready(config, find_jobs(config))
    moved = changed(path, out="elsewhere", timed_rounds=7, results=str(tmp_path))
    assert len(ready(load_ablation(moved), find_jobs(load_ablation(moved)))[0]) == 3, "where it ran changes nothing"


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"points": [2, 3]}, "points: expected rising multiples of the first"),
        ({"points": [2]}, "the last being steps"),
        ({"grid": {"rates": [1e-3], "steps": 2, "seed": 1}}, "expected none of the arms' seeds 0 to 1, got 1"),
        (
            {"arms": {"ki": {"paper": {"than": "pi0", "expected": "worse", "says": ""}}}},
            "expected another arm, got 'pi0'",
        ),
        ({"arms": {"ki": {}, "kj": {}}}, "arm kj: recipe: expected a file, or one of"),
        ({"arms": {"ki": {"without": ["fast_scale"]}}}, "arms.ki.without: expected keys of run, got fast_scale"),
        ({"arms": {"ki": {"without": ["model.stat"]}}}, "arms.ki.without: expected keys of run, got model.stat"),
        ({"arms": {"ki": {"without": ["robot.name"]}}}, "arms.ki.without: expected keys of run, got robot.name"),
        (
            {"closed_loop": {"splits": {"all": "aram"}, "episodes": 1, "earlier": 1}},
            "closed_loop.yaml: closed_loop.splits.all: environment: expected one of arm, ",
        ),
        ({"start": "gone.yaml"}, "start.yaml: start: training configuration gone.yaml: "),
        ({"knowledge": {"questions": "gone.jsonl", "kinds": {"vqa": ""}}}, "expected data in gone.jsonl, found none"),
        ({"run": {"seed": 1}}, "run: expected what all arms share, got seed"),
        ({"run": {"robot": "demo_arm"}}, "arm ki: sources: expected sources, got none"),
    ],
)
def test_a_comparison_that_is_none_is_refused(
    changes: dict[str, Any], fault: str, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablate.main(["--config", str(changed(tiny, **changes))]) == 2
    told = capsys.readouterr().err
    assert fault in told and "Traceback" not in told


def test_what_a_plan_cannot_run_is_refused(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = changed(tiny, closed_loop={"splits": {"all": "arm/knwn"}, "episodes": 1, "earlier": 1})
    assert ablate.main(["--config", str(path), "--plan"]) == 2
    told = capsys.readouterr().err
    assert "closed_loop.splits.all: environment: expected one of arm/" in told and "did you mean 'known'?" in told
    assert ablate.main(["--config", str(tiny), "--plan", "--arms", "kii"]) == 2
    assert "--arms: expected some of ki, pi0, got kii; did you mean 'ki'?" in capsys.readouterr().err


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    for content in ('{"format": 1', '{"format": 0, "made_of": {}}', "[]", '{"format": 1}'):
        (tmp_path / "ki-0.json").write_text(content)
        with pytest.raises(
            ConfigurationError, match=r"ki-0\.json: expected the result of a run in format 1, .*move it"
        ):
            read_result(tmp_path / "ki-0.json")
    assert check_result(tmp_path / "none.json", {}) is None


# --- the driver


class Done:
    """In place of a process: the job is done at once, or fails."""

    def __init__(self, returncode: int) -> None:
        self.returncode = returncode

    def poll(self) -> int:
        return self.returncode

    def terminate(self) -> None: ...
    def wait(self) -> None: ...


def test_what_is_there_is_not_run_again_and_what_fails_holds_up_nobody_else(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed(tiny, results=str(tmp_path))
    config, begun, broken = load_ablation(path), list[str](), {"pi0-0"}

    def start(_: Path, job: Job) -> Done:
        begun.append(job.name)
        if job.name in broken:
            return Done(2)
        of = start_made_of(config) if job.kind == "start" else made_of(config, job, START)
        write_result(result_path(config.results, job.name), of, START if job.kind == "start" else {"error": 0.1})
        return Done(0)

    monkeypatch.setattr(ablate, "_start", start)
    monkeypatch.setattr(ablate, "check_start", lambda config, result: None)  # nothing was trained
    assert ablate.main(["--config", str(path), "--jobs", "2"]) == 2
    assert begun[0] == "start" and sorted(begun) == sorted(job.name for job in find_jobs(config))
    assert "got 1 that failed: pi0-0" in capsys.readouterr().err
    broken.clear()
    reported = list[Path]()
    monkeypatch.setattr(ablate, "write_report", lambda folder: reported.append(folder) or [])
    assert ablate.main(["--config", str(path), "--report"]) == 0
    assert begun[len(find_jobs(config)) :] == ["pi0-0"]
    assert ablate.main(["--report"]) == 0 == ablate.main(["--report", "."])
    assert reported == [tmp_path.parent, Path("docs/results/ablation"), Path()]


def test_runs_from_two_starts_are_refused_and_a_small_start_goes_with_the_results(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results are committed and what is in `out` is not, so the start there may be none, or another machine's."""
    config = load_ablation(tiny)
    start, policy = read_result(result_path(config.results, "start")), start_config(config).out / "policy"
    assert start is not None
    path = changed(tiny, results=str(tmp_path))
    write_result(result_path(tmp_path, "start"), start_made_of(config), start | {"weights": "0f" * 32})
    assert ablate.main(["--config", str(path)]) == 2
    assert f"weights {'0f' * 32}, got {start['weights']}; bring it here" in capsys.readouterr().err
    kept, away = config.results / "start", tmp_path / "away"
    shutil.move(policy, away)
    trial.check_start(config, start)
    assert trial.fingerprint(policy) == trial.fingerprint(away) == start["weights"]
    shutil.rmtree(kept)
    shutil.rmtree(policy)
    with pytest.raises(ConfigurationError, match="got none; bring it here"):
        trial.check_start(config, start)
    shutil.move(away, policy)
    monkeypatch.setattr(trial, "LARGEST_KEPT", 1000)
    trial.train_start(config)
    assert not kept.exists()


@pytest.mark.parametrize("job", [Job("start"), Job("grid", "ki", 100, 1e-3), Job("run", "ki", 0, 1e-3)])
def test_without_held_out_robot_data_nothing_is_trained(
    job: Job, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start is the first that would be, though it needs none itself."""
    monkeypatch.setattr(Trainer, "run", lambda self: pytest.fail("it has begun"))
    content = yaml.safe_load(tiny.read_text())
    start = yaml.safe_load(Path(content["start"]).read_text()) | {"held_out_share": 0.0, "out": str(tmp_path / "start")}
    if job.kind == "start":
        (tmp_path / "start.yaml").write_text(yaml.safe_dump(start))
        content["start"] = str(tmp_path / "start.yaml")
    path = changed(tiny, run=content["run"] | {"held_out_share": 0.0}, start=content["start"])
    with pytest.raises(
        ConfigurationError, match=r"run\.held_out: expected data of robot demo_arm that is kept apart, got"
    ):
        trial.run_job(load_ablation(path), job, START)


def test_a_run_that_was_begun_with_another_rate_is_refused(tiny: Path, tmp_path: Path) -> None:
    path = changed(tiny, results=str(tmp_path / "results"), out=str(tmp_path / "out"))
    config = load_ablation(path)
    start = read_result(result_path(load_ablation(tiny).results, "start"))
    job = Job("grid", "ki", 100, 1e-2)
    trial.begin(training_config(config, job).out, made_of(config, Job("grid", "ki", 100, 1e-3), start or {}))
    with pytest.raises(ConfigurationError, match=r"begun\.json: expected a run of this configuration, .*learning_rate"):
        trial.run_job(config, job, start)


def test_what_a_run_is_of_has_its_robots_file_and_a_steps_time_no_rate(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path alone would not tell that the robot was described anew."""
    config = load_ablation(tiny)
    ki, timing = (made_of(config, Job(kind, "ki"), START) for kind in ("run", "timing"))
    changed_robot = read_robot(find_robot("demo_arm")).model_copy(update={"horizon": 3})
    monkeypatch.setattr(plan, "read_robot", lambda path: changed_robot)
    plan._robots.cache_clear()
    other = made_of(config, Job("run", "ki"), START)
    plan._robots.cache_clear()
    assert {name for name in ki if ki[name] != other[name]} == {"robot"}
    assert "run.stages.0.learning_rate" in ki and not any("learning_rate" in name for name in timing)


@pytest.mark.slow
def test_a_run_that_is_stopped_anywhere_comes_to_the_same_figures(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in training after the first checkpoint, between two points, and before its result is written.

    Episodes here depend on the weights alone; the simulator has tests of its own.
    """

    def weigh(run: Run, loop: ClosedLoop, episodes: int, sampler: Sampler | None = None) -> dict[str, Any]:
        weighed = sum(float(tensor.double().sum()) for tensor in run.model.state_dict().values())
        return {"known": {"follow": weighed.hex(), "success": episodes, "malformed": 0}}

    monkeypatch.setattr(measures, "drive", weigh)
    config = load_ablation(tiny)
    start, job = read_result(result_path(config.results, "start")), Job("run", "ki", 0, 1e-2)
    trial.run_job(config, job, start)
    whole = read_result(result_path(config.results, job.name))
    path = changed(tiny, results=str(tmp_path / "results"), out=str(tmp_path / "out"))
    config = load_ablation(path)
    real = {"drive": measures.drive, "accumulate": None, "write": trial.write_result}
    driven = list[int]()

    def stopping(name: str, after: int) -> Any:
        calls = iter(range(100))

        def call(*given: Any) -> Any:
            if next(calls) == after:
                raise KeyboardInterrupt
            driven.append(given[2]) if name == "drive" else None
            return real[name](*given)

        return call

    real["accumulate"] = Trainer.accumulate_gradients
    for name, place, after in (
        ("accumulate", (Trainer, "accumulate_gradients"), 3),
        ("drive", (measures, "drive"), 1),
        ("write", (trial, "write_result"), 0),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(*place, stopping(name, after))
            with pytest.raises(KeyboardInterrupt):
                trial.run_job(config, job, start)
        assert read_result(result_path(config.results, job.name)) is None
    with monkeypatch.context() as patch:
        patch.setattr(measures, "drive", lambda *given: weigh(*given) if given[3:] else pytest.fail("measured again"))
        trial.run_job(config, job, start)
    found = read_result(result_path(config.results, job.name))
    assert found is not None and whole is not None and driven == [1]
    for result in (found, whole):
        for key in ("latency_ms", "minutes", "date"):
            del result[key]
        for point in result["points"]:
            del point["minutes"]
    assert found == whole
    assert len(list((tmp_path / "out/ki-0").glob("checkpoint-*"))) == 1


# --- the measures


def test_only_a_policy_that_acts_otherwise_is_also_driven_by_its_tokens(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first split; none without action tokens, or with those that are said after noisy actions."""
    asked = list[tuple[str, ...]]()

    def note(run: Run, loop: ClosedLoop, episodes: int, sampler: Sampler | None = None) -> dict[str, Any]:
        asked.append((*loop.splits, type(sampler).__name__, str(episodes)))
        return {split: {"follow": "1"} for split in loop.splits}

    monkeypatch.setattr(measures, "drive", note)
    loop = ClosedLoop(splits={"known": "arm/known", "novel": "arm/novel"}, episodes=3, earlier=1)
    config = load_ablation(changed(tiny, arms={name: {} for name in ("ki", "pi0", "pi0_fast", "hybrid_mask")}))
    found = {
        arm: measures.drive_by_tokens(Run(training_config(config, Job("run", arm, 0, 1e-3))), loop)
        for arm in config.arms
    }
    assert found == {"ki": {"follow": "1"}, "pi0": None, "pi0_fast": None, "hybrid_mask": None}
    assert asked == [("known", "TokenSampler", "3")]


def test_a_place_may_be_a_little_off_and_a_word_may_not() -> None:
    true = ["<loc_3>", "<loc_20>", "<eos>"]
    assert measures.is_right(["<loc_5>", "<loc_18>", "<eos>"], true, 2.0)
    assert not measures.is_right(["<loc_6>", "<loc_18>", "<eos>"], true, 2.0)
    assert not measures.is_right(["<loc_3>", "<loc_20>"], true, 2.0)
    assert not measures.is_right(["<loc_3>", "red", "<eos>"], true, 2.0)
    assert measures.is_right(["<loc0512>", "<eos>"], ["<loc0500>", "<eos>"], 102.4)
    assert not measures.is_right(["red", "ball"], ["red", "cube"], 9.0)


class Guided:
    """A run whose policy goes the right way but from seed 1,000,001 on; from seed 1,000,003 on it has no chunk."""

    def __init__(self) -> None:
        self.data = SimpleNamespace(robot=Slider().robot)

    def act(self, sampler: Sampler | None = None) -> Any:
        def act(images: Any, state_S: np.ndarray, instruction: str, number: int) -> np.ndarray:
            seed = number >> 16
            actions_HD = np.tile(state_S, (4, 1))
            actions_HD[:, 0] += (0.1 if seed == 1_000_000 else -0.1) * np.arange(1, 5)
            return actions_HD * np.nan if seed >= 1_000_003 else actions_HD

        return act


def test_an_episode_is_a_digit_in_the_order_of_the_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "open_environment", lambda name: Slider())
    loop = ClosedLoop(splits={"all": "slider"}, episodes=4, earlier=1)
    found = measures.drive(Guided(), loop, 4)  # type: ignore[arg-type]
    assert found == {"all": {"follow": "1000", "success": "1000", "malformed": 1}}


# --- the page


OF = {"start.weights": "w", "points.0": 2, "points.1": 4, "closed_loop.episodes": 2}


def synthetic(follow: float, seed: int, steps: Mapping[int, float]) -> dict[str, Any]:
    """A run whose share of followed instructions is known exactly: the first of 20 episodes."""
    digits = {step: "1" * round(20 * share) + "0" * (20 - round(20 * share)) for step, share in steps.items()}
    digits[max(steps)] = "1" * round(20 * follow) + "0" * (20 - round(20 * follow))
    points = [
        {
            "step": step,
            "episodes": {"known": {"follow": d, "success": d, "malformed": 0}},
            "knowledge": {"pointing": {"right": follow, "loss": 1.0}, "vqa": {"right": 0.5, "loss": 2.0}},
            "gradients": {"tokens": 2.0, "flow": 1.0, "cosine": -0.25},
        }
        for step, d in digits.items()
    ]
    return {
        "date": f"2026-11-2{seed + 5}",
        "machine": "x",
        "commit": "c",
        "learning_rate": 1e-3,
        "data": "d",
        "recipe": {"stages": [{"losses": {"fast": 1.0, "flow": 1.0}, "action_tokens": True}]},
        "points": points,
        "offline": {"fast_accuracy": 0.75, "fast_error": 0.05, "fast_whole": 0.875},
        "tokens_per_chunk": 21.5,
        "latency_ms": {"flow": 12.0, "tokens": 80.0},
        "by_tokens": {"follow": "1" * 5 + "0" * 15, "success": "0" * 20, "malformed": 0},
    }


@pytest.fixture
def results(tiny: Path, tmp_path: Path) -> Path:
    """ki follows 16 of 20 episodes with both seeds, pi0 four with its one."""
    path = changed(tiny, results=str(tmp_path / "ablation/tiny"))
    config = load_ablation(path)
    write_bench(config, Path("config/ablation/tiny.yaml"))
    write_start(path)
    write_grid(path, {1e-3: 0.2, 1e-2: None})
    for arm, seed, follow in (("ki", 0, 0.8), ("ki", 1, 0.8), ("pi0", 0, 0.2)):
        run = synthetic(follow, seed, {2: 0.2, 4: follow})
        write_result(result_path(config.results, f"{arm}-{seed}"), OF, run)
    seconds = {"ki": 0.2, "pi0": 0.1}
    write_result(result_path(config.results, "timing"), {}, {"seconds_per_step": seconds})
    return tmp_path / "ablation"


def rows(text: str, title: str) -> dict[str, list[str]]:
    """The cells of a section's table by the first one."""
    lines = text.split(f"### {title}")[1].split("###")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {row[0]: row[1:] for row in cells[2:]}


def test_the_page_says_what_the_files_say(results: Path) -> None:
    assert write_report(results) == [results / "tiny.svg", results.with_suffix(".md")]
    text = results.with_suffix(".md").read_text()
    assert "python -m training.ablate --config config/ablation/tiny.yaml" in text
    assert "2026-11-25 to 2026-11-26; x; commit c" in text and "All runs are there." in text
    steps = rows(text, "After equally many steps")
    assert (
        steps["ki"][:2] == ["2", "0.001"] and steps["ki"][2].startswith("80 [") and steps["pi0"][2].startswith("20 [")
    )
    seconds = rows(text, "After equally many seconds")
    assert seconds["ki"][2] == "2" and seconds["ki"][3].startswith("20 ["), (
        "half the steps, as each takes twice as long"
    )
    assert seconds["pi0"][2] == "4" and seconds["pi0"][3].startswith("20 [")
    paper = rows(text, "Beside the paper")
    assert (
        paper["pi0"][0] == "0.49"
        and paper["pi0"][2].startswith("-60 [")
        and paper["pi0"][3:6] == ["1", "cannot tell (one seed)", ""]
    )
    reached = rows(text, "Until so many are followed (known)")
    assert (
        reached["ki"][0].startswith("3 [") and reached["ki"][1].startswith("1 [") and reached["ki"][2].startswith("4 [")
    )
    assert reached["pi0"][0] == "> 4 [> 4, > 4]" and reached["pi0"][1] == "> 0 [> 0, > 0]"  # at most 42 %: Wilson
    known = rows(text, "What the vision-language model still knows")
    assert known["(the common start)"][:2] == ["99.0%", "50.0%"] and known["pi0"][0] == "20.0%"
    assert rows(text, "Action tokens")["ki"][:4] == ["21.5", "75.0%", "0.050", "12.5%"]
    assert rows(text, "Action tokens")["ki"][4].startswith("25 [")
    times = rows(text, "Time, and gradients in the backbone")
    assert times["ki"] == ["200", "2.00", "12.0", "80.0", "-", "2.000", "1.000", "-0.250"]
    assert rows(text, "Learning rates")["ki"] == ["0.2000", "-"]


def test_a_persons_words_survive(results: Path) -> None:
    write_report(results)
    (results / "notes.yaml").write_text("page: What we make of it.\ntiny: {pi0: too few | steps}\n")
    write_report(results)
    text = results.with_suffix(".md").read_text()
    assert "\nWhat we make of it.\n" in text and rows(text, "Beside the paper")["pi0"][5] == "too few / steps"
    assert "page: What we make of it." in (results / "notes.yaml").read_text()
    (results / "notes.yaml").write_text("- none\n")
    with pytest.raises(ConfigurationError, match=r"notes\.yaml: expected page"):
        write_report(results)


def test_a_run_that_is_missing_is_named_and_one_of_another_start_refused(results: Path) -> None:
    (results / "tiny/ki-1.json").unlink()
    write_report(results)
    assert "Not all runs are there yet: ki (1 of 2)." in results.with_suffix(".md").read_text()
    write_result(results / "tiny/ki-1.json", OF | {"start.weights": "other"}, synthetic(0.5, 1, {2: 0.1, 4: 0.5}))
    with pytest.raises(ConfigurationError, match="expected runs of one start"):
        write_report(results)


@pytest.mark.parametrize("changes", [{"points.0": 3}, {"closed_loop.episodes": 40}])
def test_a_run_of_another_length_is_not_shown_as_one_of_this(results: Path, changes: dict[str, int]) -> None:
    write_result(results / "tiny/ki-1.json", OF | changes, synthetic(0.5, 1, {2: 0.1, 4: 0.5}))
    with pytest.raises(
        ConfigurationError, match=r"ki-1\.json: expected a run with points after \[2, 4\] steps and 2 ep"
    ):
        write_report(results)


def test_other_questions_of_the_same_name_are_no_comparison(results: Path) -> None:
    run = synthetic(0.8, 1, {2: 0.2, 4: 0.8}) | {"questions": "another file"}
    write_result(results / "tiny/ki-1.json", OF, run)
    with pytest.raises(ConfigurationError, match="the same questions, got others in pi0-0 and ki-1"):
        write_report(results)


def test_a_refused_configuration_leaves_the_page_as_it_was(
    tiny: Path, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablate, "check_start", lambda config, start: None)  # it is not what refuses
    before = (results / "tiny/bench.json").read_bytes()
    path = changed(tiny, results=str(results / "tiny"), steps=8, points=[4, 8])
    assert ablate.main(["--config", str(path)]) == 2
    assert (results / "tiny/bench.json").read_bytes() == before


def test_the_figure_has_every_arm_and_its_curve(results: Path) -> None:
    write_report(results)
    figure = xml.parse(results / "tiny.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    titles = [element.text for element in figure.iter(f"{space}title")]
    assert "ki, known: 80% [" in "".join(title for title in titles if title and title.startswith("ki, known"))
    assert len(list(figure.iter(f"{space}circle"))) == 2
    assert [line.find(f"{space}title").text for line in figure.iter(f"{space}polyline")] == ["ki", "ki"]  # type: ignore[union-attr]


def test_without_results_there_is_no_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ablate.main(["--report", str(tmp_path)]) == 2
    assert "expected folders with bench.json" in capsys.readouterr().err
    (tmp_path / "bench.json").write_text("{}")
    assert ablate.main(["--report", str(tmp_path)]) == 2
    assert (
        f"expected the folder of several comparisons, got one's own; give {tmp_path.parent}" in capsys.readouterr().err
    )


def test_a_rate_that_diverges_is_a_result_of_the_grid_and_a_fault_of_a_run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*_: object) -> None:
        raise FloatingPointError("gradient norm nan")

    path = changed(tiny, results=str(tmp_path / "results"), out=str(tmp_path / "out"))
    config = load_ablation(path)
    monkeypatch.setattr(Trainer, "accumulate_gradients", diverge)
    job = Job("grid", "pi0", 100, 1e-2)
    trial.run_job(config, job, START)
    found = read_result(result_path(config.results, job.name))
    assert found is not None and found["error"] is None and found["diverged"] == "gradient norm nan"
    with pytest.raises(ConfigurationError, match=r"pi0-0: .* the grid's rate 0\.01 \(gradient norm nan\)"):
        trial.run_job(config, Job("run", "pi0", 0, 1e-2), START)
