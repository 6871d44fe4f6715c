"""Parameter files as rcl's own parser reads them and as we do: the same values with the same types, or both refuse."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import rclpy
from rclpy._rclpy_pybind11 import RCLError
from rclpy.exceptions import InvalidParameterTypeException
from rclpy.node import Node

from ki_vla_ros.doctor.findings import Findings
from ki_vla_ros.doctor.setup import read_settings
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.ros.parameters import Parameters
from ki_vla_ros.settings.parameter_file import NODE, load_sections, load_settings, matches
from ki_vla_ros.settings.settings import Settings
from ki_vla_ros.share import find_share

# Each is the value of a parameter; another parameter follows it, which shows where rcl continues.
VALUES = (
    """
on|off|On|oN|yes|y|Y|n|NO|true|TRUE|tRUE|False|~|null||''|"1"|'on'|"1.0"
1|-1|+1|010|08|09.5|-010|0x1F|0X1f|-0x10|0x|0o17|0b11|1_000|0|-0|9223372036854775807|9223372036854775808
-9223372036854775808|-9223372036854775809|12:30:45|2020-01-01
1.|.5|+.5|1e3|1E-3|1e|.|-0.0|.inf|-.inf|+.Inf|.iNF|.nan|.NaN|-.nan|inf|nan|Infinity|nan(1)|0x1p3|0x1.8|1.5.2
1e400|1e-400|1e-310|5e-324|2.2250738585072014e-308|0e5
!!str 5|!!str on|!!int "5"|!!float 5|! 5|!foo 5|&x 5|*x
[]|[1, 2]|[1, 2.0]|[1.0, 2.0]|[on, no]|[a, b]|[a, 1]|["1", b]|[1,]|[,]|[[1]]|[[1], 2]|[[1, 2], [3]]|[{q: 1}]|[{q: 1}, 2]
{}|{b: 1, c: 2.0}|{b: {c: on}}|{b}|{a: }|{b: 1, b: 2.0}
a b c|a # comment|'a # no'|a: b|=|<<|-|@x|`x|%x|é|'it''s'|"a\\tb"|"a\\0b"|a\tb\t# tab
""".strip()
    .replace("\n", "|")
    .split("|")
)

_P = "/policy:\n  ros__parameters:\n"
_BOTH = "left:\n  ros__parameters: {a: 1}\n  policy:\n    ros__parameters: {a: 2}\n"
_WILD = "/**:\n  ros__parameters: {a: 1, b: 1}\n"
FILES = [
    *(f"{_P}    a: {value}\n    z: 1\n" for value in VALUES),
    # no parameters at all
    *("", "# nothing\n", "foo\n", "/policy:\n", "/policy: 5\n", "/policy: {}\n", "- a\n"),
    *(_P, f"{_P}    {{}}\n", f"{_P}    5\n", "ros__parameters:\n  a: 1\n", "/policy:\n  a: 1\n"),
    # twice
    *(f"{_P}    a: {one}\n    a: {two}\n" for one, two in (("1", "2"), ("1", "2.0"), ("2.0", "1"), ("x", "on"))),
    *(f"{_P}    a: {one}\n    a: {two}\n" for one, two in (("[1]", "x"), ("[1.0]", "[2]"), ("5", "{b: 2.0}"))),
    *(f"{_P}    a.b: 1\n    a: {{b: 2.0}}\n", f"{_P}    a: {{b: 2.0}}\n    a.b: 1\n"),
    *(f"{_P}    a: 1\n{_P}    b: 2\n", f"{_P}    a: 1\n{_P}    a: 2\n", f"{_P}    a: 1\n{_P}    5\n"),
    # several sections: the later one wins, each at the place where it is first named
    *(f"{_WILD}{_P}    a: 2\n", f"{_P}    a: 2\n{_WILD}", f"{_P}    a: 2\n{_WILD}{_P}    a: 3\n"),
    f"/*/policy:\n  ros__parameters: {{a: 5}}\n{_WILD}/left/policy:\n  ros__parameters: {{b: 6}}\n",
    # tables in tables
    f"{_P}    a:\n      b:\n        c: 1\n      d: 2\n    e: 3\n",
    f"{_P}    a: {{b.c: {{d: 1}}, e: 2}}\n    f: 3\n",
    *(f"{_P}    a: {{}}\n    b: {{c: 1}}\n", f"{_P}    a: {{}}\nleft:\n  ros__parameters: {{q: 1}}\n"),
    # names of nodes
    *(
        f"{name}:\n  ros__parameters: {{a: 1}}\n"
        for name in (
            *("policy", "/policy", "/**", "**", "/*", "*", "/**/policy", "/*/policy", "/left/policy", "left/policy"),
            *("/left/*", "/left/**", "//policy", "/policy/", "/po*", "/1policy", "/my-arm", "/***", "/*/*", "/__p/q"),
            *(f"/{'p' * 255}", f"/{'p' * 256}", f"/{'p' * 244}/x", f"/{'p' * 245}/x"),
        )
    ),
    *(_BOTH, f"{_BOTH}policy:\n  ros__parameters: {{a: 3}}\n", f"{_BOTH}  ros__parameters: {{b: 3}}\n"),
    "left:\n  arm/policy:\n    ros__parameters: {a: 1}\n  policy:\n    ros__parameters: {a: 2}\n",
    "/:\n  policy:\n    ros__parameters: {a: 1}\n",
    *("/policy:\n  ros__parametersX: {a: 1}\n", "/policy:\n  ros__parameters: [{a: 1}]\n"),
    # YAML
    *(f"---\n{_P}    a: 1\n---\n{_P}    b: 2\n", f"{_P}    a: 1\n...\n", f"%YAML 1.1\n---\n{_P}    a: on\n"),
    *("/policy:\n\tros__parameters:\n\t\ta: 1\n", f"{_P}    a:\t1\n", f"{_P}    a: 1\r\n    b: 2\r\n"),
    *(
        f"{_P}    a: |\n      5\n",
        f"{_P}    a: |-\n      5\n",
        f"{_P}    a: >-\n      on\n",
        f"{_P}    a: |2-\n        5\n",
    ),
    *(f"{_P}    ? a\n    : 1\n", f"{_P}    ? [a]\n    : 1\n", f"{_P}    ? {{a: 1}}\n    : 1\n"),
    *(f'{_P}    "": 1\n', f"{_P}    ~: 1\n", f"{_P}    1: 2\n", f"{_P}    on: 2\n", f"{_P}    a b: 2\n"),
    *(f"d: &x 1\n{_P}    a: *x\n", f"{_P}    a: &x 1\n    <<: *x\n", f"{_P}    <<: {{b: 1}}\n"),
    *(f"\ufeff{_P}    a: 1\n", f"{_P}    a: \x01\n", f"{_P}    a: [1\n", f"{_P}   a: 1\n  b: 2\n"),
    "/policy: {ros__parameters: {a: 1, b: [x, y], c: {d: .5}}}",
]
NODES = ("/policy", "/left/policy")


@pytest.fixture
def path(ros_environment: dict[str, str], tmp_path: Path) -> Path:
    return tmp_path / "params.yaml"


@contextmanager
def real_node(path: Path, name: str) -> Iterator[Node]:
    """A node with this full name, started with this file."""
    context = rclpy.Context()
    rclpy.init(args=["--ros-args", "--params-file", str(path)], context=context)
    namespace, _, short = name.rpartition("/")
    quiet = {"start_parameter_services": False, "enable_rosout": False}
    try:
        node = Node(short, namespace=namespace or "/", context=context, **quiet)
        yield node
        node.destroy_node()
    finally:
        context.shutdown()


def read_by_rcl(path: Path, name: str) -> dict[str, str] | None:
    """The values that rcl reads, None if it refuses; as text, so that types count and nan equals nan."""
    try:
        with real_node(path, name) as node:
            return {name: repr(parameter.value) for name, parameter in node._parameter_overrides.items()}
    except RCLError:
        return None


def read_by_us(path: Path, node: str) -> dict[str, str] | None:
    try:
        sections = load_sections(path)
    except ConfigurationError:
        return None
    matching = [values for name, values in sections.items() if matches(name, node)]
    return {name: repr(value) for values in matching for name, value in values.items()}


def test_values_equal_those_that_rcl_reads(path: Path) -> None:
    differ = []
    for text in FILES:
        path.write_bytes(text.encode())
        for node in NODES:
            rcl, ours = read_by_rcl(path, node), read_by_us(path, node)
            if rcl != ours:
                differ.append(f"{text!r} for {node}: rcl {rcl}, ours {ours}")
    assert not differ, "\n".join(differ)
    assert len(FILES) > 200


def declared(path: Path) -> Settings | None:
    """The settings of the policy node that starts with this file; None if it does not start."""
    try:
        with real_node(path, NODE) as node:
            return Parameters(node, arguments=["--ros-args", "--params-file", str(path)]).settings
    except (ConfigurationError, InvalidParameterTypeException):
        return None


GOOD = [
    "{rate_hz: 2.e1, dry_run: on, threads: 02, executor: rtc, use_sim_time: no}",
    "{limits: {velocity_scale: 0x1p-1}, cameras: {wrist: {topic: /wrist, max_age_s: .1}}, bundle: '08'}",
    "{rate_hz: 08, rate_hz: 20.0, limits.joints.elbow.velocity: 5e-1, instruction: !!str on, autostart: Y}",
]
BAD = [
    "{rate_hz: 10}",
    "{threads: 08}",
    "{dry_run: 'on'}",
    "{instruction: on}",
    "{rate_hz: 10.0, rate_hz: 10}",
    "{rate_hz: 1e3}",
    "{rate_hz: .nan}",
    "{max_age_s: []}",
    "{rate: 10.0}",
    "{use_sim_time: 1}",
    "{qos_overrides./clock.depth: 1}",
    "{qos_overrides./policy/chunk.publisher.depth: 0}",
    "{qos_overrides./policy/chunk.publisher.reliability: always}",
    "{qos_overrides./policy/chunk.publisher.liveliness: automatic}",
]


SHARED = [
    "/**:\n  ros__parameters: {update_rate: 100, rate_hz: 20.0, robot_description_semantic: x, tf: {prefix: p}}\n",
    "/*:\n  ros__parameters: {joints: [a]}\n/policy:\n  ros__parameters: {rate_hz: 20.0, use_sim_time: false}\n",
    "/**:\n  ros__parameters: {qos_overrides: {/scan: {subscription: {deadline: 5}}}, threads: 2}\n",
]


@pytest.mark.parametrize("text", SHARED)
def test_a_file_for_several_nodes_starts_this_one(path: Path, text: str) -> None:
    path.write_text(text)
    settings = load_settings(path)
    assert settings == declared(path) != Settings()
    findings = Findings()
    assert read_settings(path, findings) == settings and {finding.level for finding in findings} <= {"warning"}
    path.write_text(text.replace("/**:", "/policy:").replace("/*:", "/policy:"))
    assert declared(path) is None


def test_a_misspelt_name_in_a_section_for_several_nodes_is_refused(path: Path) -> None:
    path.write_text("/**:\n  ros__parameters: {update_rate: 100, execution_horizon: 0.2}\n")
    findings = Findings()
    assert declared(path) is None and read_settings(path, findings) is None
    assert {finding.level for finding in findings} == {"warning", "error"}


def test_a_file_that_starts_the_node_can_be_replayed_and_examined(path: Path) -> None:
    path.write_text(find_share("config/demo.yaml").read_text())
    for parameters in [None, *GOOD]:
        if parameters is not None:
            path.write_text(f"/**/policy:\n  ros__parameters: {parameters}\n")
        findings = Findings()
        settings = load_settings(path)
        assert settings == declared(path) == read_settings(path, findings)
        assert settings != Settings() and not findings


@pytest.mark.parametrize("parameters", BAD)
def test_a_file_that_does_not_start_the_node_is_refused_by_replay_and_found_by_doctor(
    path: Path, parameters: str
) -> None:
    path.write_text(f"/**/policy:\n  ros__parameters: {parameters}\n")
    findings = Findings()
    assert declared(path) is None and read_settings(path, findings) is None and findings
    with pytest.raises(ConfigurationError):
        load_settings(path)
