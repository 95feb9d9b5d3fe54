"""The report's charts: Vega-Lite specifications, drawn to SVG while the report is written.

Every colour is a CSS variable of the page (report/report.css), so that one drawing serves both themes. Each mark's
`text` becomes its description for screen readers, which the page also shows on hover. Data reaches a specification as
values only, never as a field name or an expression.
"""

from __future__ import annotations

import re
from typing import Any

import vl_convert

WIDTH, HEIGHT = 300, 150
ROW_HEIGHT, LEAST_GROUP = 9, 18  # of one bar, of all bars of a group
COLORS = 6  # --series-0 to --series-5 of the page
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [4, 4], [1, 3])
CONFIG = {
    "background": None,
    "font": "inherit",
    "view": {"stroke": None},
    "axis": {
        "domainColor": "var(--line)",
        "gridColor": "var(--line)",
        "tickColor": "var(--line)",
        "labelColor": "var(--muted)",
        "titleColor": "var(--muted)",
        "titleFontWeight": "normal",
        "labelFontSize": 11,
        "titleFontSize": 11,
        "labelFlush": False,
    },
    "legend": {
        "title": None,
        "labelColor": "var(--ink)",
        "labelFontSize": 11,
        "labelLimit": WIDTH,
        "orient": "bottom",
        "columns": 2,
        "symbolType": "stroke",
        "symbolSize": 300,
        "symbolStrokeWidth": 2,
    },
}
SHARE = {"domain": [0, 1]}
UNDRAWABLE = re.compile("[\u2028\u2029]|[^\t\n\r -\ud7ff\ue000-\ufffd]")
FLOOR = {"type": "rule", "color": "var(--ink)", "strokeDash": [4, 3]}


def color(position: int) -> str:
    return f"var(--series-{position % COLORS})"


def bars(values: list[dict[str, Any]], title: str) -> str:
    """Grouped bars with intervals, 0 to 1, upright.

    values: {"group", "run", "series": position of the run's colour, "value", "text", and where known "low", "high"}.
    """
    x = {
        "field": "group",
        "type": "nominal",
        "sort": None,
        "title": title,
        "axis": _two_lines(),
        "scale": {"paddingInner": 0.25},
    }
    offset = {"field": "series", "type": "ordinal"}
    return _draw(
        values,
        {"x": x, "xOffset": offset, "description": {"field": "text"}},
        [
            {
                "mark": {"type": "bar", "cornerRadiusEnd": 2},
                "encoding": {"y": _share("value"), "color": _series(values)},
            },
            {"mark": _interval(), "encoding": {"y": _share("low"), "y2": {"field": "high"}}},
        ],
        height=HEIGHT,
    )


def rows(values: list[dict[str, Any]], title: str) -> str:
    """The same without intervals, lying: for groups with long names."""
    y = _names("group", labelLimit=130)
    offset = {"field": "series", "type": "ordinal"}
    encoding = {"x": _share("value", title), "color": _series(values), "description": {"field": "text"}}
    layer = {"mark": {"type": "bar", "cornerRadiusEnd": 2}, "encoding": {"y": y, "yOffset": offset, **encoding}}
    step = max(ROW_HEIGHT, LEAST_GROUP / len({value["run"] for value in values}))
    return _draw(values, {}, [layer], height={"step": step}, width=WIDTH - 70)


def dots(values: list[dict[str, Any]], title: str, floor: float | None) -> str:
    """One point with its interval per run, 0 to 1; `floor` is a dashed line."""
    y = _names("run", labelLimit=110, labelPadding=10)  # beside a point at 0
    point = {"type": "point", "filled": True, "size": 90, "opacity": 1}
    shown = {"y": y, "color": _series(values), "description": {"field": "text"}}
    layers = [
        {
            "mark": {"type": "rule", "strokeWidth": 2},
            "encoding": {**shown, "x": _share("low", title), "x2": {"field": "high"}},
        },
        {"mark": point, "encoding": {**shown, "x": _share("value", title)}},
    ]
    if floor is not None:
        layers.append(
            {"mark": FLOOR, "encoding": {"x": {"datum": floor}, "description": {"value": "always-transfer floor"}}}
        )
    return _draw(values, {}, layers, height={"step": 30}, width=WIDTH - 50)


def lines(values: list[dict[str, Any]], x_title: str, domain: list[float] | None = None) -> str:
    """Curves over whole numbers. values: {"x", "y", "name", "series": position of its colour, "dash", "text"}."""
    names = list(dict.fromkeys(value["name"] for value in values))
    first = [next(value for value in values if value["name"] == name) for name in names]
    by_name = {"field": "name", "type": "nominal", "sort": None}
    legend = {} if len(names) > 1 else {"legend": None}
    colors = {**by_name, **legend, "scale": {"domain": names, "range": [color(one["series"]) for one in first]}}
    dashes = {
        **by_name,
        **legend,
        "scale": {"domain": names, "range": [DASHES[one["dash"] % len(DASHES)] for one in first]},
    }
    x = {"field": "x", "type": "quantitative", "title": x_title, "scale": {"nice": False, "zero": False}}
    y_scale = {"domain": domain} if domain else {"zero": False}
    encoding = {
        "x": {**x, "axis": {"tickMinStep": 1, "format": "d", "grid": False, "tickCount": 6}},
        "y": {"field": "y", "type": "quantitative", "title": None, "scale": y_scale, "axis": {"tickCount": 5}},
    }
    few = len(values) <= 40 * len(names)
    return _draw(
        values,
        encoding,
        [
            {"mark": {"type": "line", "strokeWidth": 2}, "encoding": {"color": colors, "strokeDash": dashes}},
            {
                "mark": {"type": "point", "filled": True, "size": 28 if few else 0, "opacity": 1},
                "encoding": {"color": colors, "description": {"field": "text"}},
            },
        ],
        height=HEIGHT,
    )


def _draw(values: list[dict], encoding: dict, layers: list[dict], **size: Any) -> str:
    spec = {
        "data": {"values": values},
        "encoding": encoding,
        "layer": layers,
        "config": CONFIG,
    }
    svg = vl_convert.vegalite_to_svg(_drawable({"width": WIDTH, **spec, **size}))
    return re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg, count=2)  # an SVG inside HTML needs none


def _drawable(part: Any) -> Any:
    """A specification without what vl-convert 1.9 cannot draw: a character that XML forbids aborts the process, a
    surrogate pair (past U+FFFF) breaks when a long name is cut, U+2028 and U+2029 break Vega's expressions."""
    if isinstance(part, dict):
        return {key: _drawable(value) for key, value in part.items()}
    if isinstance(part, list):
        return [_drawable(value) for value in part]
    return UNDRAWABLE.sub("�", part) if isinstance(part, str) else part


def _share(field: str, title: str | None = None) -> dict[str, Any]:
    axis = {"tickCount": 5, "format": ".1f"}
    return {"field": field, "type": "quantitative", "scale": SHARE, "title": title, "axis": axis, "stack": None}


def _names(field: str, **axis: int) -> dict[str, Any]:
    """One line for each, in their order."""
    return {"field": field, "type": "nominal", "sort": None, "title": None, "axis": {"ticks": False, **axis}}


def _two_lines() -> dict[str, Any]:
    return {"labelAngle": 0, "labelExpr": "split(datum.label, '\\n')", "ticks": False, "labelPadding": 6}


def _interval() -> dict[str, Any]:
    return {"type": "rule", "color": "var(--ink)", "strokeWidth": 1.25, "aria": False}


def _series(values: list[dict]) -> dict[str, Any]:
    """The runs' colours, by number: a scale's domain ends up in Vega's expressions, where a name like "if" breaks."""
    found = sorted({value["series"] for value in values})
    scale = {"domain": found, "range": [color(series) for series in found]}
    return {"field": "series", "type": "ordinal", "scale": scale, "legend": None}
