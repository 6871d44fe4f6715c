"""Every setting once: its ROS parameter, the parameter file, and the session that a bag holds."""

from ki_vla_ros.settings.limits import UNLIMITED, LimitSettings, RuleAction
from ki_vla_ros.settings.names import ParameterSpec, check_names, parameter_specs, settings_from_parameters
from ki_vla_ros.settings.parameter_file import (
    NODE,
    PARAMETERS,
    load_sections,
    load_settings,
    parameter_values,
    settings_from_values,
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
    "ParameterSpec",
    "ReferenceName",
    "RuleAction",
    "Session",
    "SessionTopics",
    "Settings",
    "TorchModeName",
    "check_names",
    "load_sections",
    "load_settings",
    "parameter_specs",
    "parameter_values",
    "read_session",
    "resolve",
    "session_topic",
    "settings_from_parameters",
    "settings_from_values",
]
