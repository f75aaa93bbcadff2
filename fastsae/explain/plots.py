"""What `fastsae eval explanations` shows: one table (text or Markdown) and one plot (SVG)."""

from collections.abc import Sequence
from html import escape
from typing import Any

_COLUMNS = (
    ("precision", "precision@{top}"),
    ("auroc", "AUROC"),
    ("discourse_precision", "on discourse features"),
    ("output", "Δ log p"),
    ("output_other", "other features"),
    ("diversity", "diversity"),
    ("lexical", "lexical"),
    ("dominance", "dominance"),
    ("discourse", "discourse words"),
)
_BAR, _GAP, _LEFT, _PANEL, _HEAD = 15, 5, 150, 250, 46


def as_rows(result: dict[str, Any], intervals: bool = True) -> list[list[str]]:
    """The table of one SAE: a header, a row per method, and chance."""
    header = ["objective", *(name.format(**result["settings"]) for _, name in _COLUMNS)]
    rows = [header]
    for name, found in result["methods"].items():
        rows.append([name, *(_cell(found[key], key, intervals) for key, _ in _COLUMNS)])
    chance = [_cell(result["chance"].get(key), key, False) for key, _ in _COLUMNS]
    rows.append(["chance", *chance])
    return rows


def _cell(value, key: str, intervals: bool) -> str:
    if isinstance(value, dict):
        if value["mean"] is None:
            return "–"
        text = f"{value['mean']:.3f}" if key != "output" else f"{value['mean']:+.3f}"
        if not intervals or key == "output_other":
            return text
        return f"{text} ±{(value['high'] - value['low']) / 2:.3f}"
    return "–" if value is None else f"{value:.3f}"


def as_text(result: dict[str, Any]) -> str:
    """The table in columns; ± is half of the 95 % bootstrap interval."""
    rows = as_rows(result)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def as_markdown(results: Sequence[dict[str, Any]], keys: Sequence[str]) -> str:
    """Methods down, SAEs across: the given measures of every SAE, the best of each in bold."""
    names = dict(_COLUMNS)
    head, lines = ["objective"], []
    for result in results:
        head += [
            f"{result['sae']['hook']}: {names[key].format(**result['settings'])}" for key in keys
        ]
    methods = list(dict.fromkeys(name for result in results for name in result["methods"]))
    for name in methods:
        cells = [name]
        for result in results:
            for key in keys:
                values = {n: _mean(m[key]) for n, m in result["methods"].items()}
                best = max((v for v in values.values() if v is not None), default=None)
                text = _cell(result["methods"].get(name, {}).get(key), key, False)
                cells.append(f"**{text}**" if values.get(name) == best is not None else text)
        lines.append(cells)
    lines.append(
        ["chance"] + [_cell(r["chance"].get(key), key, False) for r in results for key in keys]
    )
    table = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in table)


def _mean(value) -> float | None:
    return value["mean"] if isinstance(value, dict) else value


def as_svg(results: Sequence[dict[str, Any]], key: str = "precision") -> str:
    """A bar per method and a panel per SAE, 95 % intervals as whiskers, chance as a dashed line."""
    names = list(dict.fromkeys(name for result in results for name in result["methods"]))
    title = dict(_COLUMNS)[key].format(**results[0]["settings"])
    measures = [m[key] for r in results for m in r["methods"].values() if m[key]["n"]]
    limit = max([m["high"] for m in measures] + [1e-9]) * 1.05
    height = _HEAD + len(names) * (_BAR + _GAP) + 24
    width = _LEFT + len(results) * _PANEL
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="8" y="18" font-size="14">{escape(title)}</text>',
    ]
    for i, name in enumerate(names):
        y = _HEAD + i * (_BAR + _GAP) + _BAR - 3
        out.append(f'<text x="{_LEFT - 8}" y="{y}" text-anchor="end">{escape(name)}</text>')
    for panel, result in enumerate(results):
        left, scale = _LEFT + panel * _PANEL, (_PANEL - 60) / limit
        out.append(f'<text x="{left}" y="36">{escape(str(result["sae"]["hook"]))}</text>')
        for i, name in enumerate(names):
            measure = result["methods"].get(name, {}).get(key)
            if not measure or not measure["n"]:
                continue
            y = _HEAD + i * (_BAR + _GAP)
            low, mean, high = (left + measure[k] * scale for k in ("low", "mean", "high"))
            color = "#c2571a" if name == result["best"] else "#4878a8"
            out.append(
                f'<rect x="{left}" y="{y}" width="{mean - left:.1f}" height="{_BAR}" '
                f'fill="{color}"/><path d="M{low:.1f} {y + _BAR / 2}H{high:.1f}" '
                f'stroke="black"/><text x="{high + 4:.1f}" y="{y + _BAR - 3}">'
                f"{measure['mean']:.3f}</text>"
            )
        chance = result["chance"].get(key)
        if chance and chance["n"]:
            x, end = left + chance["mean"] * scale, height - 20
            out.append(
                f'<path d="M{x:.1f} {_HEAD - 4}V{end}" stroke="black" stroke-dasharray="3 3"/>'
                f'<text x="{x:.1f}" y="{end + 13}" text-anchor="middle" font-size="10">chance '
                f"{chance['mean']:.3f}</text>"
            )
    return "\n".join([*out, "</svg>"]) + "\n"
