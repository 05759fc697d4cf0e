"""The tables of a report as HTML; a script only makes them sortable."""

from collections.abc import Mapping, Sequence
from html import escape

from polyroute.report_page.summary import Reference, ResultRow
from polyroute.study.intervals import Estimate

__all__ = ["results_table", "tasks_table"]

MOST_TASKS = 500
"""The most tasks in the page; the CSV file has all."""
STAGES = {"zero-shot": "zero-shot", "trained": "tasks of training"}


def results_table(rows: Sequence[ResultRow], references: Sequence[Reference]) -> str:
    """The table of results, with a control that chooses the reference of the differences.

    Args:
        rows: the rows of the table.
        references: what the rows can be compared with; the page opens with the first.
    """
    if not rows:
        return '<p class="missing">No run has scores; adapt or evaluate one.</p>'
    first = references[0]
    has_settings = any(row.setting for row in rows)
    is_several = len({row.split for row in rows}) > 1
    header = (
        *_head("run", "method", "phase"),
        *_head("setting", shown=has_settings),
        *_head("split", shown=is_several),
        *_head("shots", "tasks", "seeds", "mean score", number=True),
        '<th scope="col" data-number>difference to <span data-reference>'
        f"{escape(first.name)}</span></th>",
        *_head("trained parameters", "seconds", number=True),
    )
    body = []
    for i, (row, difference) in enumerate(zip(rows, first.differences, strict=True)):
        cells = [
            f'<th scope="row" class="name">{escape(row.run)}</th>',
            _text(row.method),
            _text(STAGES.get(row.stage, row.phase)),
            _text(row.setting) if has_settings else "",
            _text(row.split) if is_several else "",
            _number(row.shots, ","),
            _number(row.estimate.tasks, ","),
            _number(row.repeats, ","),
            _estimate(row.estimate, ".3f"),
            '<td class="number">reference</td>'
            if first.others[i] == i
            else _estimate(difference, "+.3f", marked=True),
            _number(row.parameters, ","),
            _number(row.seconds, ".1f"),
        ]
        body.append(f'<tr data-row="{i}">{"".join(cells)}</tr>')
    options = [
        f'<option value="{i}">{escape(each.name)}</option>' for i, each in enumerate(references)
    ]
    runs = len(references) - len(rows)
    return (
        '<p class="controls"><label>compare with '
        f'<select id="reference"><optgroup label="a run, at the same shots">'
        f'{"".join(options[:runs])}</optgroup><optgroup label="one line">'
        f"{''.join(options[runs:])}</optgroup></select></label></p>"
        '<div class="scroll" tabindex="0" role="region" aria-label="results">'
        '<table id="results" class="sortable"><caption>Mean scores over tasks, from 0 to 1, with '
        "95% intervals. Differences are paired by task; a star marks intervals without zero."
        "</caption>"
        f"<thead><tr>{''.join(header)}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def tasks_table(rows: Sequence[ResultRow], categories: Mapping[str, str]) -> str:
    """The table with the score of each task in each row, up to a limit."""
    tasks = sorted({task for row in rows for task in row.scores})
    if not tasks:
        return ""
    shown = tasks[:MOST_TASKS]
    more = (
        f" The first {len(shown)} of {len(tasks):,}; tasks.csv has all."
        if len(shown) < len(tasks)
        else ""
    )
    has_categories = any(categories.get(task) for task in shown)
    header = (
        *_head("task"),
        *_head("category", shown=has_categories),
        *_head(*(row.name for row in rows), number=True),
    )
    body = "".join(
        f'<tr><th scope="row" class="name">{escape(task)}</th>'
        + (_text(categories.get(task, "")) if has_categories else "")
        + "".join(_number(row.scores.get(task), ".3f") for row in rows)
        + "</tr>"
        for task in shown
    )
    return (
        f'<details class="table"><summary>Scores of the {len(tasks):,} tasks</summary>'
        '<div class="scroll tall" tabindex="0" role="region" aria-label="scores of tasks">'
        '<table id="tasks" class="sortable"><caption>Score of each task, the mean over seeds.'
        f"{more}</caption><thead><tr>{''.join(header)}</tr></thead><tbody>{body}</tbody></table>"
        "</div></details>"
    )


def _head(*names: str, number: bool = False, shown: bool = True) -> list[str]:
    mark = " data-number" if number else ""
    return [f'<th scope="col"{mark}>{escape(name)}</th>' for name in names if shown]


def _text(text: str) -> str:
    return f'<td class="name">{escape(text)}</td>'


def _number(value: float | None, form: str) -> str:
    if value is None:
        return '<td class="number" data-value="">-</td>'
    return f'<td class="number" data-value="{value}">{value:{form}}</td>'


def _estimate(estimate: Estimate | None, form: str, *, marked: bool = False) -> str:
    """A cell with a mean and its interval; if `marked`, with a star if zero lies outside it."""
    if estimate is None:
        return _number(None, form)
    mean, low, high, _ = estimate
    interval = ""
    if low is not None and high is not None:
        interval = f"<small>{low:{form}} to {high:{form}}</small>"
        marked = marked and (low > 0 or high < 0)
    style = "number clear" if marked and interval else "number"
    return f'<td class="{style}" data-value="{mean}"><b>{mean:{form}}</b>{interval}</td>'
