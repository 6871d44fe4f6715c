"""Settings: one place for defaults and bounds, joint validation, and messages that name the parameter."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError
from support.bundles import both_ways_policy, demo_policy, mixed_policy, mixed_robot

from ki_vla_ros.errors import ConfigurationError, ParameterError
from ki_vla_ros.robot import Robot
from ki_vla_ros.settings.names import check_names, parameter_specs, settings_from_parameters
from ki_vla_ros.settings.settings import Settings
from ki_vla_ros.share import find_bundle, find_share


def test_defaults_are_valid_and_fit_the_demo_policy() -> None:
    settings = settings_from_parameters({})
    settings.validate_against(demo_policy())
    assert settings.rate_hz == 10.0
    assert settings.camera("wrist").topic == "camera/wrist/image_raw"


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        settings_from_parameters({}).rate_hz = 5.0  # type: ignore[misc]


def test_every_setting_is_a_parameter_with_its_default_and_a_description() -> None:
    specs = {spec.name: spec for spec in parameter_specs(["wrist"])}
    assert settings_from_parameters({name: spec.default for name, spec in specs.items()}) == settings_from_parameters(
        {"cameras.wrist.topic": ""}
    )
    nested = {"limits", "cameras"}
    assert {name.split(".")[0] for name in specs} == set(Settings.model_fields)
    assert nested <= {name.split(".")[0] for name in specs if "." in name}
    for spec in specs.values():
        assert spec.description
        numeric = isinstance(spec.default, (int, float)) and not isinstance(spec.default, bool)
        assert numeric == (spec.minimum is not None) == (spec.maximum is not None), spec.name


def test_changeable_settings() -> None:
    changeable = {spec.name for spec in parameter_specs(["wrist"]) if spec.changeable}
    assert {"execution_horizon_s", "flow_steps", "limits.velocity_scale", "max_age_s"} <= changeable
    assert not changeable & {"bundle", "engine", "command_topic", "cameras.wrist.topic", "autostart"}


@pytest.mark.parametrize(
    "name, value",
    [
        ("rate_hz", 0.0),
        ("rate_hz", 100.0),
        ("rate_hz", float("nan")),
        ("max_age_s", float("inf")),
        ("flow_steps", -1),
        ("engine", "abacus"),
        ("limits.velocity_scale", 1.5),
        ("limits.max_overspeed", 0.5),
        ("threads", "many"),
    ],
)
def test_bad_values_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=f"parameter '{name}'.*got"):
        settings_from_parameters({name: value})


def test_all_mistakes_are_reported_at_once_one_per_line() -> None:
    with pytest.raises(ParameterError) as error:
        settings_from_parameters({"rate": 5, "limits.velocity": 1.0, "flow_steps": -1, "engine": "abacus"})
    assert len(error.value.problems) == 4 and str(error.value).splitlines() == list(error.value.problems)
    assert error.value.problems[:2] == (
        "parameter 'rate': no such parameter; did you mean 'rate_hz'?",
        "parameter 'limits.velocity': no such parameter; did you mean 'limits.velocity_scale'?",
    )
    with pytest.raises(ParameterError, match=r"(?s)'rate'.*'engin'"):
        check_names(["rate", "rate_hz", "engin"])


@pytest.mark.parametrize(
    "unknown, nearest",
    [
        ("rate", "rate_hz"),
        ("execution_horizon", "execution_horizon_s"),
        ("limits.velocity", "limits.velocity_scale"),
        ("cameras.wrist.topics", "cameras.wrist.topic"),
        ("camera.wrist.topic", None),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(unknown: str, nearest: str | None) -> None:
    with pytest.raises(ConfigurationError, match=f"parameter '{unknown}': no such parameter") as error:
        check_names(["rate_hz", unknown])
    assert nearest is None or f"did you mean '{nearest}'?" in str(error.value)


def test_a_bundle_is_a_folder_or_the_name_of_a_shipped_one(tmp_path: Path) -> None:
    assert find_bundle(str(tmp_path)) == tmp_path
    assert find_bundle("/not/there") == Path("/not/there")  # load_bundle says what is wrong with it
    with pytest.raises(ConfigurationError, match=r"models/nowhere: expected .* bench, demo, got 'nowhere'"):
        find_bundle("nowhere")
    with pytest.raises(ConfigurationError, match=r"did you mean 'demo'\?"):
        find_bundle("dem")
    with pytest.raises(ConfigurationError, match="parameter 'bundle': expected the folder of a model bundle"):
        find_bundle("")
    assert find_share("config/fastdds.xml").is_file()


def test_camera_names_may_contain_dots() -> None:
    assert check_names(["cameras.left.eye.topic", "limits.max_overspeed"]) == (("left.eye",), ())
    settings = settings_from_parameters({"cameras.left.eye.topic": "/eye"})
    assert settings.camera("left.eye").topic == "/eye"


def test_a_camera_that_the_bundle_lacks_is_refused() -> None:
    settings = settings_from_parameters({"cameras.wrst.topic": "/wrist/image_raw"})
    with pytest.raises(
        ConfigurationError,
        match=r"'cameras.wrst.*': bundle 'test-policy' has only scene, wrist; did you mean 'wrist'\?",
    ):
        settings.validate_against(demo_policy())


def test_the_chunk_must_outlast_the_execution_horizon_by_a_tick() -> None:
    # 16 actions of 0.05 s last 0.8 s; at 10 Hz the next chunk may come 0.1 s after the horizon.
    settings_from_parameters({"execution_horizon_s": 0.7}).validate_against(demo_policy())
    with pytest.raises(ConfigurationError, match=r"'execution_horizon_s'.*lasts 0.8 s.*at most 0.7"):
        settings_from_parameters({"execution_horizon_s": 0.71}).validate_against(demo_policy())
    with pytest.raises(ConfigurationError, match="execution_horizon_s"):
        settings_from_parameters({"execution_horizon_s": 0.7, "rate_hz": 5.0}).validate_against(demo_policy())


def test_compressed_cameras_have_their_own_default_topic() -> None:
    settings = settings_from_parameters({"cameras.wrist.transport": "compressed"})
    assert settings.camera("wrist").topic == "camera/wrist/image_raw/compressed"


def test_joint_limits_by_name() -> None:
    assert check_names(["limits.joints.elbow.upper"]) == ((), ("elbow",))
    with pytest.raises(ConfigurationError, match=r"did you mean 'limits.joints.elbow.upper'\?"):
        check_names(["limits.joints.elbow.uper"])
    limits = settings_from_parameters({"limits.joints.elbow.upper": 1.5}).limits
    assert limits.of("elbow").upper == 1.5 and limits.of("wrist").upper > 1e6
    with pytest.raises(ConfigurationError, match=r"'limits.joints.elbo.*' has only .*did you mean 'elbow'"):
        settings_from_parameters({"limits.joints.elbo.upper": 1.5}).validate_against(demo_policy())


@pytest.mark.parametrize(
    "name, tighter, looser",
    [
        ("velocity_scale", 0.4, 0.6),
        ("position_margin", 0.01, 0.03),
        ("max_overspeed", 1.5, 2.5),
        ("max_jump_s", 0.1, 0.4),
        ("max_chunk_age_s", 0.2, 0.5),
        ("time_to_speed_s", 0.2, 0.1),
        ("on_speed", "stop", "clamp"),
        ("joints.elbow.upper", 0.9, 1.1),
        ("joints.elbow.lower", -0.9, -1.1),
        ("joints.elbow.velocity", 0.9, 1.1),
        ("joints.elbow.acceleration", 0.9, 1.1),
    ],
)
def test_limits_only_become_tighter(name: str, tighter: object, looser: object) -> None:
    base = {"limits.velocity_scale": 0.5, "limits.joints.elbow.upper": 1.0, "limits.joints.elbow.lower": -1.0}
    base |= {"limits.joints.elbow.velocity": 1.0, "limits.joints.elbow.acceleration": 1.0}
    configured = settings_from_parameters(base)
    settings_from_parameters(base | {f"limits.{name}": tighter}).validate_change(configured)
    with pytest.raises(ConfigurationError, match=f"'limits.{name}': while a bundle is loaded limits may only become"):
        settings_from_parameters(base | {f"limits.{name}": looser}).validate_change(configured)


def test_delay_horizon_and_executor_fit_together() -> None:
    policy = demo_policy()

    def check(**changes: object) -> None:
        settings_from_parameters(changes).validate_against(policy)

    check(inference_delay=2, execution_horizon_s=0.1)
    with pytest.raises(ConfigurationError, match="d <= s <= H - d, got d = 3, s = 2"):
        check(inference_delay=3, execution_horizon_s=0.1)
    with pytest.raises(ConfigurationError, match="d <= s <= H - d, got d = 5, s = 12"):
        check(inference_delay=5, execution_horizon_s=0.6)
    with pytest.raises(ConfigurationError, match=r"'guidance_horizon_s': got 0.9 s"):
        check(guidance_horizon_s=0.9)
    trained = policy.model_copy(update={"max_prefix_delay": 4})
    settings_from_parameters({"executor": "rtc_trained"}).validate_against(trained)
    with pytest.raises(ConfigurationError, match=r"rtc_trained needs a model .* of 1 or more actions, .* up to 0"):
        settings_from_parameters({"executor": "rtc_trained"}).validate_against(
            policy.model_copy(update={"max_prefix_delay": 0})
        )


def test_a_slower_prefill_needs_a_state_token_and_a_cache_that_lives_long_enough() -> None:
    two_rates = settings_from_parameters({"prefill_period_s": 0.3})
    two_rates.validate_against(both_ways_policy())
    with pytest.raises(
        ConfigurationError, match=r"'prefill_period_s': got 0.3 s, but bundle 'test-policy' has the joint"
    ):
        two_rates.validate_against(demo_policy())
    short = settings_from_parameters({"prefill_period_s": 0.3, "max_kv_age_s": 0.2})
    with pytest.raises(
        ConfigurationError, match=r"'prefill_period_s': expected at most max_kv_age_s \(0.2 s\), got 0.3"
    ):
        short.validate_against(both_ways_policy())


# --- topics of the robot file


def two_topics() -> Robot:
    """The mixed robot with its gripper's joint states on a topic of their own."""
    fields = mixed_robot()
    state = [{**d, "source": {"topic": "hand/states"}} if d["name"] == "gripper" else d for d in fields["state"]]
    cameras = [
        {"name": "scene", "topic": "/front/image"},
        {"name": "wrist", "topic": "/hand/image/compressed", "transport": "compressed"},
    ]
    return Robot.model_validate({**fields, "state": state, "cameras": cameras})


def test_cameras_are_as_the_robot_file_says_unless_the_settings_say_otherwise() -> None:
    robot = two_topics()

    def chosen(**values: object) -> list[tuple[str, str]]:
        settings = settings_from_parameters(values).on_robot(robot)
        assert settings.on_robot(robot) == settings
        return [(settings.camera(name).topic, settings.camera(name).transport) for name in ("scene", "wrist")]

    assert chosen() == [("/front/image", "raw"), ("/hand/image/compressed", "compressed")]
    assert chosen(**{"cameras.scene.topic": "/eye"})[0] == ("/eye", "raw")
    assert chosen(**{"cameras.scene.transport": "compressed"})[0] == ("/front/image/compressed", "compressed")
    assert chosen(**{"cameras.wrist.transport": "raw"})[1] == ("/hand/image", "raw")
    plain = settings_from_parameters({}).on_robot(demo_policy().robot)
    assert (plain.camera("scene").topic, plain.camera("scene").transport) == ("camera/scene/image_raw", "raw")


def test_one_topic_of_joint_states_may_be_replaced_but_not_one_of_several() -> None:
    one, two = demo_policy(), mixed_policy(robot=two_topics())
    assert Settings().signal_topics(one.robot) == {"joint_states": "joint_states"}
    chosen = settings_from_parameters({"joint_states_topic": "/arm/states"})
    chosen.validate_against(one)
    assert chosen.signal_topics(one.robot) == {"joint_states": "/arm/states"}
    mixed = mixed_policy()  # its poses come from a topic of their own
    assert chosen.signal_topics(mixed.robot) == {"joint_states": "/arm/states", "tool_pose": "tool_pose"}
    same = {name: name for name in ("joint_states", "hand/states", "tool_pose")}
    assert Settings().signal_topics(two.robot) == same
    with pytest.raises(
        ParameterError, match="reads joint states from hand/states, joint_states, got /arm/states, which replaces only"
    ):
        chosen.validate_against(two)
    settings_from_parameters({"joint_states_topic": "joint_states"}).validate_against(two)


@pytest.mark.parametrize(("name", "why"), [("forward", "a velocity that nobody measures"), ("tool.rz", "a rotation")])
def test_limits_of_a_place_that_an_axis_does_not_have_are_refused(name: str, why: str) -> None:
    policy = mixed_policy()
    for limits in ({"upper": 0.2}, {"lower": -0.2}):
        chosen = {f"limits.joints.{name}.{limit}": value for limit, value in limits.items()}
        with pytest.raises(ParameterError, match=rf"limits.joints.{name}': expected no lower or upper.* for {why}"):
            settings_from_parameters(chosen).validate_against(policy)
    settings_from_parameters({f"limits.joints.{name}.velocity": 0.2}).validate_against(policy)
    for name in ("slide", "tool.x"):
        settings_from_parameters({f"limits.joints.{name}.upper": 0.2}).validate_against(policy)
