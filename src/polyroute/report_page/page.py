"""The report as one self-contained HTML page."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

import polyroute
from polyroute.report_page.contents import Contents
from polyroute.report_page.data import Run
from polyroute.report_page.tables import results_table, tasks_table

__all__ = ["GENERATOR", "render"]

GENERATOR = '<meta name="generator" content="polyroute report">'
"""Marks a page as a report; it stands near the start of the file."""
SCRIPTS = ("chart.js", "explorer.js", "report.js")


def render(report: Contents, beside: str) -> str:
    """Render the page as text.

    Args:
        report: the contents of the page.
        beside: the name of the folder with its files.
    """
    keys = {chart.key for chart in report.charts}
    content = {
        "references": [asdict(each) for each in report.references],
        "charts": [chart.to_dict() for chart in report.charts],
        "routing": [routing.to_dict() for routing in report.routing],
    }
    names = ", ".join(f"<b>{escape(run.name)}</b>" for run in report.runs)
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    return Template(_asset("template.html")).substitute(
        generator=GENERATOR,
        version=polyroute.__version__,
        style=_asset("style.css"),
        script="\n".join(map(_asset, SCRIPTS)),
        content=_embedded(content),
        runs=names,
        beside=escape(beside),
        results=results_table(report.rows, report.references),
        tasks=tasks_table(report.rows, report.categories),
        learning=_figure("learning", keys, "No run kept the losses of its training."),
        apart="\n".join(
            _figure(key, keys, f"No run measured the {what} over its training.")
            for key, what in (
                ("entropy", "entropy of its mixtures"),
                ("likeness", "skills' cosine"),
            )
        ),
        verdicts=_verdicts(report.runs),
        shots=_figure(
            "shots",
            keys,
            "Each run was adapted with one number of shots; a curve needs several.",
        ),
        parameters=_figure("parameters", keys, "No run was adapted to new tasks."),
        has_alignment="" if any(key.startswith("alignment-") for key in keys) else "hidden",
        no_alignment="hidden" if any(key.startswith("alignment-") for key in keys) else "",
        has_routing="" if report.routing else "hidden",
        no_routing="hidden" if report.routing else "",
        notes=f"<ul>{notes}</ul>" if notes else "<p>Nothing.</p>",
    )


def _figure(key: str, keys: Iterable[str], otherwise: str) -> str:
    if key in keys:
        return f'<figure class="chart" data-chart="{key}"></figure>'
    return f'<p class="missing">{otherwise}</p>'


def _verdicts(runs: Iterable[Run]) -> str:
    """A sentence for each run whose inventory is still one adapter."""
    sentences = [
        f"<li><b>{escape(run.name)}</b>: {escape(run.verdict)}.</li>"
        for run in runs
        if run.verdict is not None
    ]
    return f"<ul>{''.join(sentences)}</ul>" if sentences else ""


def _asset(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _embedded(content: Any) -> str:
    """JSON for a script element, which it cannot end: `<`, which occurs in strings, is escaped."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")
