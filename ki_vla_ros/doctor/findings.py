"""What the doctor says: one finding per fault, each with what to do about it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ki_vla_ros.errors import printable

Severity = Literal["error", "warning"]
WIDTH = 110


@dataclass(frozen=True, slots=True)
class Finding:
    """`check` names what was looked at, `where` the topic, joint or file; `fix` is what to do.

    error: the robot holds, or will not do what it should; warning: it does, but worse than it could.
    """

    level: Severity
    check: str
    where: str
    found: str
    fix: str


class Findings(list[Finding]):
    def error(self, check: str, where: str, found: str, fix: str) -> None:
        self.append(Finding("error", check, where, found, fix))

    def warning(self, check: str, where: str, found: str, fix: str) -> None:
        self.append(Finding("warning", check, where, found, fix))


def errors(findings: Sequence[Finding]) -> int:
    return sum(finding.level == "error" for finding in findings)


def as_json(findings: Sequence[Finding], looked_at: Sequence[str]) -> dict[str, Any]:
    ordered = _ordered(findings)
    return {
        "version": 1,
        "looked_at": list(looked_at),
        "errors": errors(findings),
        "findings": [asdict(f) for f in ordered],
    }


def as_table(findings: Sequence[Finding], looked_at: Sequence[str]) -> str:
    lines = [f"looked at: {', '.join(looked_at) or 'nothing'}"]
    for finding in _ordered(findings):
        head = f"{finding.level:8}{finding.check:18}"
        body = textwrap.wrap(f"{finding.where}: {finding.found}", WIDTH - len(head), break_on_hyphens=False)
        fix = textwrap.wrap(f"-> {finding.fix}", WIDTH - len(head), break_on_hyphens=False)
        lines += ["", head + body[0], *(" " * len(head) + line for line in [*body[1:], *fix])]
    count = errors(findings)
    lines += [
        "",
        f"{_counted(count, 'error')}, {_counted(len(findings) - count, 'warning')}" if findings else "no faults found",
    ]
    return printable("\n".join(lines))


def _ordered(findings: Sequence[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: finding.level != "error")


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
