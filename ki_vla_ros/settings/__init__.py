"""Every setting once: its ROS parameter, the parameter file, and the session that a bag holds."""

from ki_vla_ros.settings.limits import UNLIMITED, LimitSettings, RuleAction
from ki_vla_ros.settings.names import (
    ParameterSpec,
    check_names,
    foreign_names,
    of_ros,
    override_faults,
    override_topic,
    parameter_specs,
    settings_from_parameters,
)
from ki_vla_ros.settings.parameter_file import (
    NODE,
    PARAMETERS,
    NoSectionError,
    check_sections,
    foreign_warning,
    load_sections,
    load_settings,
    parameter_values,
    settings_from_values,
    shared_names,
)
from ki_vla_ros.settings.session import BundleIdentity, Session, SessionTopics, read_session, resolve, session_topic
from ki_vla_ros.settings.settings import ExecutorName, JacobianName, ReferenceName, Settings, TorchModeName

__all__ = [
    "NODE",
    "PARAMETERS",
    "UNLIMITED",
    "BundleIdentity",
    "ExecutorName",
    "JacobianName",
    "LimitSettings",
    "NoSectionError",
    "ParameterSpec",
    "ReferenceName",
    "RuleAction",
    "Session",
    "SessionTopics",
    "Settings",
    "TorchModeName",
    "check_names",
    "check_sections",
    "foreign_names",
    "foreign_warning",
    "load_sections",
    "load_settings",
    "of_ros",
    "override_faults",
    "override_topic",
    "parameter_specs",
    "parameter_values",
    "read_session",
    "resolve",
    "session_topic",
    "settings_from_parameters",
    "settings_from_values",
    "shared_names",
]
