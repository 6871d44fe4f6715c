"""Settings: one place for defaults and bounds, joint validation, and messages that name the parameter."""

from __future__ import annotations

from pathlib import Path

import pytest
from bundles import demo_policy
from pydantic import ValidationError

from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.settings import Settings, check_names, parameter_specs, settings_from_parameters
from ki_vla_ros.share import find_bundle, find_share


def test_defaults_are_valid_and_fit_the_demo_policy() -> None:
    settings = settings_from_parameters({})
    settings.validate_against(demo_policy())
    assert settings.rate_hz == 10.0
    assert settings.camera_topic("wrist") == "camera/wrist/image_raw"


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
        ("limits.max_slowdown", 0.5),
        ("threads", "many"),
    ],
)
def test_bad_values_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=f"parameter '{name}'.*got"):
        settings_from_parameters({name: value})


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
    with pytest.raises(ConfigurationError, match=r"models/nowhere: expected it .*/models/nowhere"):
        find_bundle("nowhere")
    with pytest.raises(ConfigurationError, match="parameter 'bundle': expected the folder of a model bundle"):
        find_bundle("")
    assert find_share("config/fastdds.xml").is_file()


def test_camera_names_may_contain_dots() -> None:
    assert check_names(["cameras.left.eye.topic", "limits.max_slowdown"]) == ("left.eye",)
    settings = settings_from_parameters({"cameras.left.eye.topic": "/eye"})
    assert settings.camera_topic("left.eye") == "/eye"


def test_a_camera_that_the_bundle_lacks_is_refused() -> None:
    settings = settings_from_parameters({"cameras.wrst.topic": "/wrist/image_raw"})
    with pytest.raises(ConfigurationError, match=r"no camera 'wrst', only scene, wrist; did you mean 'wrist'\?"):
        settings.validate_against(demo_policy())


def test_the_chunk_must_outlast_the_execution_horizon_by_a_tick() -> None:
    # 16 actions of 0.05 s last 0.8 s; at 10 Hz the next chunk may come 0.1 s after the horizon.
    settings_from_parameters({"execution_horizon_s": 0.7}).validate_against(demo_policy())
    with pytest.raises(ConfigurationError, match=r"'execution_horizon_s'.*lasts 0.8 s.*at most 0.7"):
        settings_from_parameters({"execution_horizon_s": 0.71}).validate_against(demo_policy())
    with pytest.raises(ConfigurationError, match="execution_horizon_s"):
        settings_from_parameters({"execution_horizon_s": 0.7, "rate_hz": 5.0}).validate_against(demo_policy())
