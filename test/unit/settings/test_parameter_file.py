"""Parameter files without ROS; test/ros/test_parameter_file.py compares the result with rcl's."""

from __future__ import annotations

from pathlib import Path

import pytest

from ki_vla_ros.errors import ConfigurationError, ParameterError
from ki_vla_ros.settings.names import settings_from_parameters
from ki_vla_ros.settings.parameter_file import load_parameters, load_settings, matches, parameter_values
from ki_vla_ros.settings.settings import Settings
from ki_vla_ros.share import find_share


@pytest.mark.parametrize(
    "pattern, node, fits",
    [
        ("/**/policy", "/policy", True),
        ("/**/policy", "/left/arm/policy", True),
        ("policy", "/policy", True),
        ("/*/policy", "/left/policy", True),
        ("/*/policy", "/policy", False),
        ("/**", "/left/policy", True),
        ("/**/policy", "/left/policy_2", False),
    ],
)
def test_node_names(pattern: str, node: str, fits: bool) -> None:
    assert matches(pattern, node) == fits


def test_the_demo_and_nested_names(tmp_path: Path) -> None:
    settings = load_settings(find_share("config/demo.yaml"))
    assert settings.executor == "temporal_ensemble" and settings.max_age_s == 0.4
    nested = tmp_path / "nested.yaml"
    nested.write_text("left:\n  policy:\n    ros__parameters: {use_sim_time: true, limits.velocity_scale: 0.5}\n")
    assert load_settings(nested, "/left/policy") == Settings.model_validate({"limits": {"velocity_scale": 0.5}})


@pytest.mark.parametrize(
    "text, fault",
    [
        ("/policy:\n  ros__parameters:\n    a: &x 1\n    b: *x\n", "line 4: expected a value, got the alias *x"),
        ("/policy:\n  ros__parameters:\n    a: [1, 2.0]\n", "line 3: expected int as before in this list, got 2.0"),
        ("/policy:\n  ros__parameters:\n    a:\n", "line 3: expected a value, got none"),
        ("/policy:\n  a: 1\n", "line 2: expected a node's name and ros__parameters, got the value '1'"),
        (
            "/my-arm:\n  ros__parameters: {a: 1}\n",
            "line 2: expected the name of a node before ros__parameters, got '/my-",
        ),
        ("- a\n", "line 1: expected a name or a mapping below ros__parameters, got a list"),
        ("/policy:\n\tros__parameters: {a: 1}\n", "found character that cannot start any token"),
        ("/other:\n  ros__parameters: {a: 1}\n", "no parameters for node /policy, only for /other; name it /**/policy"),
    ],
)
def test_faults_are_named_with_their_line(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        load_parameters(path)
    assert str(caught.value).startswith(f"{path}: ") and fault in str(caught.value)


def test_all_values_of_a_wrong_type_are_named(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(
        "/policy:\n  ros__parameters: {rate_hz: 10, use_sim_time: 1, threads: '2', max_age_s: [], hold: 1}\n"
    )
    with pytest.raises(ParameterError) as caught:
        load_settings(path)
    assert list(caught.value.problems) == [
        "parameter 'use_sim_time': expected bool, got int 1",
        "parameter 'threads': expected int, got str '2'",
        "parameter 'rate_hz': expected float, got int 10",
        "parameter 'max_age_s': expected float, got NoneType None",
        "parameter 'hold': no such parameter; did you mean 'hold_after_s'?",
    ]


SHARED = """
/**:
  ros__parameters: {update_rate: 100, use_sim_time: true, qos_overrides./scan.subscription.deadline: 5, max_age_s: 0.3}
/left/*:
  ros__parameters: {joints: [a, b], tf: {prefix: left}}
policy_2:
  ros__parameters: {nothing: 1}
"""


def test_other_nodes_parameters_in_a_shared_section_are_left_to_them(tmp_path: Path) -> None:
    path, warnings = tmp_path / "params.yaml", list[str]()
    path.write_text(SHARED)
    assert load_settings(path, "/left/policy", warnings.append).max_age_s == 0.3
    assert len(warnings) == 3
    for name, warning in zip(("update_rate", "joints", "tf.prefix"), warnings, strict=True):
        assert warning.startswith(f"parameter '{name}': ignored") and "is for other nodes too" in warning


@pytest.mark.parametrize("section", ["/**", "/*", "/**/policy", "/policy"])
@pytest.mark.parametrize(
    "name",
    [
        *("execution_horizon", "max_age", "limits.velocity", "cameras.wrist.fps", "joint_state_topic", "update_rate"),
        *("camera.wrist.topic", "limit.joints.elbow.velocity", "LIMITS.VELOCITY_SCALE", "use_simtime"),
        *("qos_overides./joint_states.subscription.depth", "qos_override./a.publisher.reliability"),
    ],
)
def test_misspelt_names_are_refused_in_every_section(tmp_path: Path, section: str, name: str) -> None:
    path, warnings = tmp_path / "params.yaml", list[str]()
    path.write_text(f"{section}:\n  ros__parameters: {{{name}: 0.2}}\n")
    if name == "update_rate" and section.endswith("*"):
        assert load_settings(path, "/policy", warnings.append) == Settings() and len(warnings) == 1
        return
    with pytest.raises(ParameterError, match=f"parameter '{name}': no such parameter"):
        load_settings(path, "/policy", warnings.append)
    assert warnings == []


def test_a_name_that_an_exact_section_has_too_is_ours(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("/**:\n  ros__parameters: {update_rate: 1}\n/policy:\n  ros__parameters: {update_rate: 2}\n")
    with pytest.raises(ParameterError, match="'update_rate'"):
        load_settings(path)


@pytest.mark.parametrize(
    ("section", "parameter", "fault"),
    [
        ("/policy", "qos_overrides./joint_states.subscription.reliability: reliable", ""),
        ("/policy", "qos_overrides./policy/chunk.publisher.depth: 3", ""),
        ("/policy", "qos_overrides./policy/chunk.publisher.depth: 0", "expected an int of 1 or more, got 0"),
        ("/**", "qos_overrides./policy/chunk.publisher.depth: 1.0", "expected an int of 1 or more, got 1.0"),
        ("/**", "qos_overrides./a.publisher.reliability: sometimes", "expected one of reliable, best_effort, system_d"),
        ("/policy", "qos_overrides./a.publisher.deadline: 5", "one of history, depth, reliability, durability"),
        ("/policy", "qos_overrides./a.depth: 5", "expected qos_overrides.TOPIC.publisher.POLICY"),
        ("/policy", "qos_overrides.a.publisher.depth: 5", "with the topic's full name"),
        ("/**", "qos_overrides./a.publisher.deadline: 5", ""),
        ("/**", "qos_overrides./a.publisher_2.depth: 5", ""),
        ("/**", "qos_overrides./a.publisher.dept: 5", "expected qos_overrides.TOPIC.publisher.POLICY"),
        ("/**", "qos_overrides./a.subscriber.depth: 5", "expected qos_overrides.TOPIC.publisher.POLICY"),
        ("/**", "qos_overrides.a.publisher.depth: 5", "with the topic's full name"),
    ],
)
def test_overrides_of_qos(tmp_path: Path, section: str, parameter: str, fault: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(f"{section}:\n  ros__parameters: {{{parameter}}}\n")
    if not fault:
        assert load_settings(path) == Settings()
        return
    with pytest.raises(ParameterError) as caught:
        load_settings(path)
    assert fault in str(caught.value)


def test_settings_become_parameters_and_come_back() -> None:
    values = {"limits.joints.elbow.velocity": 0.5, "cameras.wrist.topic": "/wrist", "rate_hz": 20.0}
    settings = settings_from_parameters(values)
    told = parameter_values(settings, ["wrist"], ["elbow"])
    assert values.items() <= told.items()
    assert settings_from_parameters(told).limits == settings.limits
