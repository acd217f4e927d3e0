"""The HTML page of a suite: one file, no script, no outside resource, every text escaped."""

from html import escape
from typing import Any

from engine.evaluation.suite.paper import beside_the_papers_models
from engine.evaluation.suite.results import Results

_SET_WORDS = (3,)
"""Columns of the table of sets that hold words."""
_CSS = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 1160px; padding: 36px 28px 56px; background: #fff; color: #1b1f24;
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }
h1 { font-size: 26px; margin: 0 0 2px; } h2 { font-size: 18px; margin: 36px 0 10px; }
.muted { color: #5b6470; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 12px 6px 0; text-align: right; border-bottom: 1px solid #e3e6ea; white-space: nowrap; }
th { color: #5b6470; font-weight: 600; } th:first-child, td:first-child { text-align: left; }
th.text, td.text { text-align: left; white-space: normal; }
tr.other td { color: #7c8591; } .up { color: #00664b; } .down { color: #9a3412; }
.bar { display: inline-block; height: 9px; background: #2f6fb0; border-radius: 2px; vertical-align: middle; }
.track { display: inline-block; width: 100px; background: #eef1f4; border-radius: 2px; text-align: left;
  line-height: 9px; position: relative; height: 9px; }
.mark { position: absolute; top: -3px; width: 2px; height: 15px; background: #d97706; }
.remark td { border-bottom: 1px solid #e3e6ea; text-align: left; white-space: normal; }
"""


def render(results: Results) -> str:
    """The whole page."""
    about = " · ".join(f"{escape(key)} {escape(str(value))}" for key, value in results.about.items())
    sections = [
        _section("Means", _averages(results)),
        _section("Sets", _sets(results)),
        _section("Probes", _probes(results)),
        _section("The paper's models", _models(results)),
        _section("Measures", _measures(results)),
        _section("Not scored", _missing(results)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(results.suite.title)} · eva-megatron evaluation</title>\n<style>{_CSS}</style>\n</head>\n"
        "<body>\n"
        f'<h1>{escape(results.suite.title)}</h1>\n<p class="muted">{about}</p>\n'
        + "\n".join(section for section in sections if section)
        + f'\n<p class="muted">{escape(results.suite.source)}</p>\n</body>\n</html>\n'
    )


def _section(heading: str, content: str) -> str:
    return f"<h2>{escape(heading)}</h2>\n{content}" if content else ""


def _table(head: list[str], rows: list[str], text: tuple[int, ...] = ()) -> str:
    """text: columns of words, which begin at the left and may wrap."""
    cells = "".join(_cell("th", at, escape(cell), text) for at, cell in enumerate(head))
    return f'<div class="scroll"><table><tr>{cells}</tr>\n' + "\n".join(rows) + "</table></div>" if rows else ""


def _cells(values: list[Any], kind: str = "", text: tuple[int, ...] = ()) -> str:
    return f'<tr class="{kind}">' + "".join(_cell("td", at, value, text) for at, value in enumerate(values)) + "</tr>"


def _cell(tag: str, at: int, value: Any, text: tuple[int, ...]) -> str:
    return f'<{tag} class="text">{value}</{tag}>' if at in text else f"<{tag}>{value}</{tag}>"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _difference(value: float | None) -> str:
    if value is None:
        return "–"
    return f'<span class="{"up" if value >= 0 else "down"}">{value:+.1f}</span>'


def _bar(score: float, reference: float | None) -> str:
    mark = "" if reference is None else f'<span class="mark" style="left:{reference:.0f}px"></span>'
    return f'<span class="track"><span class="bar" style="width:{score:.0f}px"></span>{mark}</span>'


def _averages(results: Results) -> str:
    rows = [
        _cells(
            [escape(entry["name"]), entry["sets"], _percent(entry["score"]), _percent(entry["reference"]),
             _difference(entry["difference"])]
        )
        for entry in results.average_table()
    ]  # fmt: skip
    return _table(["mean", "sets", "%", "reference", "difference"], rows)


def _sets(results: Results) -> str:
    rows = []
    for entry in results.set_table():
        told = [escape(entry["set"]), entry["transform"], entry["frames"], escape(entry["metric"])]
        numbers = [_percent(entry["score"]), _bar(entry["score"], entry["reference"]), _percent(entry["reference"])]
        counts = [f"{entry['samples']:,}", f"{entry['left_out']:,}"]
        values = [*told, *numbers, _difference(entry["difference"]), _percent(entry["chance"]), *counts]
        rows.append(_cells(values, "" if entry["best"] else "other", _SET_WORDS))
        if entry["remark"] and entry["best"]:
            rows.append(f'<tr class="remark"><td colspan="11" class="muted">{escape(entry["remark"])}</td></tr>')
    return _table(
        ["set", "transform", "frames", "measure", "%", "", "reference", "+/-", "chance", "samples", "left out"],
        rows,
        _SET_WORDS,
    )


def _probes(results: Results) -> str:
    rows = [
        _cells([escape(entry["set"]), entry["transform"], entry["frames"], escape(_probe_name(name)), _percent(share)])
        for entry in results.set_table()
        for name, share in entry["probes"].items()
    ]
    return _table(["set", "transform", "frames", "probe", "top-1, %"], rows)


def _probe_name(measure: str) -> str:
    return measure.removeprefix("probe_").removesuffix("_top1").replace("_", " ")


def _measures(results: Results) -> str:
    titles = {spec.name: spec.title for spec in results.suite.sets}
    rows = []
    for row in results.rows:
        shares = [f"{escape(k.replace('_', ' '))} {100 * v:.2f}" for k, v in row.measures.items() if v <= 1]
        rows.append(_cells([escape(titles[row.name]), row.transform, row.frames, ", ".join(shares)], "", (3,)))
    return _table(["set", "transform", "frames", "all measures in %"], rows, (3,))


def _models(results: Results) -> str:
    head, *rows = beside_the_papers_models(results) or [[]]
    cells = [
        _cells([escape(str(model)), *(_percent(v) for v in values if not isinstance(v, str))])
        for model, *values in rows
    ]
    return _table([str(name) for name in head], cells)


def _missing(results: Results) -> str:
    rows = [_cells([escape(name), escape(why)], "", (1,)) for name, why in results.missing.items()]
    return _table(["set", "why"], rows, (1,))
