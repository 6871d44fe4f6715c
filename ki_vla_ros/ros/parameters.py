"""Settings as ROS parameters: declared, checked together, and kept up to date while the node runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult
from rclpy.exceptions import (
    InvalidParameterTypeException,
    InvalidParameterValueException,
    ParameterUninitializedException,
)
from rclpy.node import Node
from rclpy.parameter import Parameter

from ki_vla_ros.bundle import Manifest
from ki_vla_ros.errors import ConfigurationError, ParameterError
from ki_vla_ros.ros.releases import call_after_set
from ki_vla_ros.runtime import axis_bounds
from ki_vla_ros.settings import (
    ParameterSpec,
    Settings,
    check_names,
    check_sections,
    foreign_names,
    foreign_warning,
    load_sections,
    of_ros,
    override_faults,
    override_topic,
    parameter_specs,
    settings_from_parameters,
    shared_names,
)

# Declared by rclpy. The stamps of inputs and motions that a configured node holds are times of one clock.
SIMULATED_TIME = "use_sim_time"
# Topics of every node, which rclpy makes.
TOPICS_OF_ROS = ("/clock", "/parameter_events", "/rosout")
_REFUSALS = (InvalidParameterTypeException, InvalidParameterValueException, ParameterUninitializedException)


class Parameters:
    """The parameters of `node`; ConfigurationError if one from YAML or the command line is not valid.

    `settings` is replaced as a whole, so a thread that reads it once has values that belong together. `manifest` is set
    while a bundle is loaded: settings must then fit it, and only some may change.
    """

    def __init__(
        self, node: Node, report_change: Callable[[], None] = lambda: None, arguments: Sequence[str] = ()
    ) -> None:
        """`report_change` is called after each change, when `settings` already has it.

        `arguments` are the process's: only its parameter files tell which values were meant for other nodes too.
        """
        self.manifest: Manifest | None = None
        self._node = node
        self._report_change = report_change
        self._specs: dict[str, ParameterSpec] = {}
        self._of_bundle: set[str] = set()  # declared by `load`
        # rclpy silently ignores overrides that nobody declares, and it has no public way to list them.
        self._overrides: Mapping[str, Parameter[Any]] = node._parameter_overrides
        self._declare(parameter_specs(*self._check_overrides(arguments)))
        self.settings = self._configured = self._read({})
        node.add_on_set_parameters_callback(self._check)
        call_after_set(node, self._apply)

    def _check_overrides(self, arguments: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The cameras and joints that YAML and command line name; ParameterError for what is not a parameter of ours.

        In sections for several nodes, names that are not like ours are left to the other nodes, with a warning.
        """
        given = {name: parameter.value for name, parameter in self._overrides.items()}
        files = [Path(file) for flag, file in pairwise(arguments) if flag == "--params-file"]
        sections, node = [load_sections(file) for file in files], self._node.get_fully_qualified_name()
        for file, found in zip(files, sections, strict=True):
            check_sections(found, file, node)
        self._shared = shared_names(sections, node)
        foreign = foreign_names(given, self._shared)
        for name in foreign:
            self._node.get_logger().warning(foreign_warning(name))
        if faults := list(override_faults(given, self._shared)):
            raise ParameterError(faults)
        return check_names(name for name in given if name not in foreign and not of_ros(name))

    def warn_of_unused_overrides(self) -> None:
        """To be called when all topics are there: an override for a topic that the node does not have has no effect."""
        for name in self._overrides.keys() - self._shared:
            topic = override_topic(name)
            if topic and topic not in TOPICS_OF_ROS and not self._node.has_parameter(name):
                self._node.get_logger().warning(
                    f"parameter {name!r}: has no effect, this node has no such publisher or subscription on {topic}; "
                    "give the topic's full name, after remapping"
                )

    def load(self, manifest: Manifest) -> Settings:
        """Declares the parameters of the bundle's cameras and joints that YAML did not name; returns the settings.

        ConfigurationError if the settings do not fit the bundle or leave a joint no range. Until `unload`, changed
        settings must fit it too, and limits may only become tighter.
        """
        cameras = [camera.name for camera in manifest.cameras]
        known = {spec.name: spec for spec in parameter_specs(cameras, manifest.axis_names)}
        # What an earlier bundle brought and nobody has set since must not stand in the way of this one.
        for name in self._of_bundle - known.keys():
            if self._node.get_parameter(name).value == self._specs[name].default:
                self._node.undeclare_parameter(name)
                self._of_bundle.remove(name)
                del self._specs[name]
        new = [spec for name, spec in known.items() if name not in self._specs]
        self._declare(new)
        self._of_bundle.update(spec.name for spec in new)
        self.settings = self._read({})
        self._check_fit(self.settings, manifest)
        self.manifest, self._configured = manifest, self.settings
        return self.settings

    @property
    def values(self) -> dict[str, Any]:
        """All parameters that the settings consist of, by name."""
        return {name: self._node.get_parameter(name).value for name in self._specs}

    def unload(self) -> None:
        self.manifest = None

    def _declare(self, specs: Iterable[ParameterSpec]) -> None:
        for spec in specs:
            try:
                self._node.declare_parameter(spec.name, spec.default, _descriptor(spec))
                self._node.get_parameter(spec.name)  # raises where YAML gives an empty list, which rclpy declares
            except _REFUSALS as error:
                got = self._overrides[spec.name].value
                bounds = "" if spec.minimum is None else f" from {spec.minimum:g} to {spec.maximum:g}"
                expected = f"{type(spec.default).__name__}{bounds}"
                raise ConfigurationError(
                    f"parameter {spec.name!r}: expected {expected}, got {type(got).__name__} {got!r}"
                ) from error
            self._specs[spec.name] = spec

    def _read(self, changes: Mapping[str, object]) -> Settings:
        return settings_from_parameters({**self.values, **changes})

    @staticmethod
    def _check_fit(settings: Settings, manifest: Manifest) -> None:
        """Whatever could keep the loop from acting upon these settings: what ROS stores must be what is in force."""
        settings.validate_against(manifest)
        axis_bounds(manifest.axes, settings.limits, settings.robot_description)

    def _check(self, parameters: list[Parameter[Any]]) -> SetParametersResult:
        changes = {p.name: p.value for p in parameters if p.name in self._specs}
        try:
            if self.manifest is not None:
                for name, value in ((p.name, p.value) for p in parameters):
                    fixed = name == SIMULATED_TIME or (name in self._specs and not self._specs[name].changeable)
                    if fixed and value != self._node.get_parameter(name).value:
                        raise ConfigurationError(
                            f"parameter {name!r}: changes only while the node is unconfigured; clean up first"
                        )
            settings = self._read(changes)
            if self.manifest is not None:
                self._check_fit(settings, self.manifest)
                settings.validate_change(self._configured)
        except ConfigurationError as error:
            return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)

    def _apply(self, parameters: list[Parameter[Any]]) -> None:
        self.settings = self._read({})
        if changed := [f"{p.name} = {p.value!r}" for p in parameters if p.name in self._specs]:
            self._node.get_logger().info(f"changed: {', '.join(changed)}")
            self._report_change()


def _descriptor(spec: ParameterSpec) -> ParameterDescriptor:
    descriptor = ParameterDescriptor(description=spec.description)
    if spec.minimum is not None and spec.maximum is not None:
        low, high = spec.minimum, spec.maximum
        if isinstance(spec.default, int):
            descriptor.integer_range = [IntegerRange(from_value=int(low), to_value=int(high), step=1)]
        else:
            descriptor.floating_point_range = [FloatingPointRange(from_value=float(low), to_value=float(high))]
    return descriptor
