"""HTML pages and plots that need no other file."""

from ki_vla_ros.report.pages import page, remark, section, table, tiles, warning
from ki_vla_ros.report.plots import Axes, Span, clock, figure, lanes, spark

__all__ = [
    "Axes",
    "Span",
    "clock",
    "figure",
    "lanes",
    "page",
    "remark",
    "section",
    "spark",
    "table",
    "tiles",
    "warning",
]
