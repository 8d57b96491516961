"""The sections of a page, each a piece of HTML."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence

from ..config.fields import FIELDS
from ..measures import base, measure, show
from ..report import counted
from .comparison import Comparison
from .configs import short_fields, show_value
from .curves import Curve, thinned
from .dots import intervals
from .markup import View, _, chip, name_of, table
from .pictures import Picture
from .plots import LOG_RANGE, chart
from .table import paired_rows

POINTS, FEWER_POINTS = 140, 70
"""Of a curve: about one for every two pixels of a chart, and half of that for charts that are folded away."""


def head(view: View) -> str:
    found = view.verdict
    told = " · ".join([f"Comparison of {_count(view.comparison)}", *view.comparison.facts])
    parts = [f'<header><p class="eyebrow">{_(told)}</p><h1>{_(found.sentence)}</h1>']
    if found.detail:
        parts.append(f'<p class="lead">{_(found.detail)}</p>')
    parts.append("</header>")
    if view.comparison.warnings:
        parts.append('<ul class="warnings">' + "".join(f"<li>{_(w)}</li>" for w in view.comparison.warnings) + "</ul>")
    parts.append(intervals(view))
    if (pairs := paired_rows(view.comparison)) is not None:
        heads, rows, what = pairs
        parts.append(
            f"<section><h2>{_(heads[0][0].upper() + heads[0][1:])}, seed by seed</h2>"
            f"{table('cards', ['run', *heads[1:]], [[_(cell) for cell in row] for row in rows])}"
            f'<p class="quiet">{_(what[0].upper() + what[1:])}.</p></section>'
        )
    if found.reasons:
        beside = f" from {_(found.against)}" if found.against else ""
        told = "".join(f"<li>{_(reason)}</li>" for reason in found.reasons)
        parts.append(
            f'<section class="why"><h2>What sets {_(found.winner or "them")} apart{beside}</h2><ul>{told}</ul>'
            '<p class="quiet">Differences, not proofs: any of them, or none, may be the cause.</p></section>'
        )
    return "".join(parts)


def _count(comparison: Comparison) -> str:
    runs = sum(len(group.members) for group in comparison.groups)
    groups = len(comparison.groups)
    sizes = {len(group.members) for group in comparison.groups}
    return (
        counted(runs, "run")
        if runs == groups
        else f"{counted(groups, 'setting')}, " + (f"{sizes.pop()} seeds each" if len(sizes) == 1 else f"{runs} runs")
    )


def differences(view: View) -> str:
    comparison = view.comparison
    shown, folded = comparison.shown_differences, [d for d in comparison.differences if d.folded]
    if not comparison.differences:
        return ""
    parts = ["<section><h2>What differs in their configs</h2>"]
    if not shown:
        parts.append("<p>Nothing that has an effect.</p>")
    elif len(shown) > len(comparison.groups):
        heads = ["field", *(comparison.groups[i].name for i in view.order)]
        parts.append(
            table(
                "fields words",
                heads,
                [
                    [f"<code>{_(d.field)}</code>", *(_setting(d.values[i], d.acts[i]) for i in view.order)]
                    for d in shown
                ],
            )
        )
    else:
        heads = ["run", *short_fields([d.field for d in shown])]
        rows = [
            [f"{chip(view, i)}{_(comparison.groups[i].name)}", *(_setting(d.values[i], d.acts[i]) for d in shown)]
            for i in view.order
        ]
        parts.append(table("cards words", heads, rows, ["", *(d.field for d in shown)]))
    if any(not there for d in shown for there in d.acts):
        parts.append('<p class="quiet">· does not act there.</p>')
    parts.append(_meanings([d.field for d in shown]))
    if folded:
        heads = ["field", *(comparison.groups[i].name for i in view.order)]
        rows = [[f"<code>{_(d.field)}</code>", *(_setting(d.values[i], True) for i in view.order)] for d in folded]
        noun = "field differs" if len(folded) == 1 else "fields differ"
        parts.append(
            f"<details><summary>{len(folded)} more {noun} without effect</summary>{table('fields words', heads, rows)}</details>"
        )
    return "".join([*parts, "</section>"])


def _meanings(fields: Sequence[str]) -> str:
    """What settings are, folded away, by the schema's own words."""
    known = {field: FIELDS[field].description for field in fields if field in FIELDS}
    words = "".join(f"<dt><code>{_(f)}</code></dt><dd>{_(about)}</dd>" for f, about in known.items() if about)
    return f"<details><summary>What these settings mean</summary><dl>{words}</dl></details>" if words else ""


def _setting(value: object, acts: bool) -> str:
    text = _(show_value(value, acts))
    return f"<code>{text}</code>" if acts else f'<span class="quiet">{text}</span>'


# ---- curves


def curves(view: View) -> str:
    comparison = view.comparison
    drawn, constant = [], []
    for i, curve in enumerate(comparison.curves):
        values = {p.mean for points in curve.groups for p in points}
        if not values:
            continue
        if len(values) == 1:
            constant.append(f"{curve.key} {show(curve.key, values.pop())}")
        else:
            telling = i < comparison.telling
            drawn.append((telling, _chart(view, curve, POINTS if telling else FEWER_POINTS)))
    if not drawn:
        return ""
    legend = "".join(
        f'<label class="{view.colours[i]}"><input type="checkbox" checked data-group="{i}">{_swatch()}{_(comparison.groups[i].name)}</label>'
        for i in view.order
    )
    hidden = "".join(
        f'.curves:has([data-group="{i}"]:not(:checked)) .g{i}{{display:none}}' for i in range(len(comparison.groups))
    )
    bands = any(p.count > 1 for curve in comparison.curves for points in curve.groups for p in points)
    told = "Lines are means over seeds, bands their 95 % intervals. " if bands else ""
    first = "".join(text for telling, text in drawn if telling)
    rest = "".join(text for telling, text in drawn if not telling)
    parts = [
        f'<section class="curves"><style>{hidden}</style><h2>Over training</h2><p class="quiet">{told}<span class="scripted">Point at a chart to read its values.</span></p>',
        f'<div class="legend">{legend}</div><div class="charts">{first}</div>',
    ]
    if rest:
        count = sum(not telling for telling, _text in drawn)
        parts.append(
            f'<details><summary>{count} more {"curve" if count == 1 else "curves"}</summary><div class="charts">{rest}</div></details>'
        )
    if constant:
        parts.append(f'<p class="quiet">The same throughout, in all runs that have it: {_(", ".join(constant))}.</p>')
    return "".join([*parts, "</section>"])


def _swatch() -> str:
    return '<svg class="swatch" viewBox="0 0 26 10" aria-hidden="true"><path class="line" d="M1 5H25"/></svg>'


def _chart(view: View, curve: Curve, most: int) -> str:
    known, column = measure(curve.key), view.comparison.column
    groups = [thinned(points, most) for points in curve.groups]
    lines = []
    if column is not None and column.key == curve.key:
        lines += [(column.floor, "real against real")] if column.floor is not None else []
        lines += [(column.reference, "bicubic")] if column.reference is not None else []
    classes = [f"{colour} g{i}" for i, colour in enumerate(view.colours)]
    # of a distance that shrinks in training, the end is what runs are told apart by
    near = 4.0 if column is not None and column.key == curve.key and known.better == "lower" else LOG_RANGE
    percent = base(curve.key)[0] in ("fm/share", "health/diversity")
    svg, shown = chart(
        groups,
        classes,
        known.label,
        lines=lines,
        show=(lambda v: f"{100 * v:.3g} %") if percent else None,
        log_from=near,
    )
    notes = [known.about] if known.about else []
    notes += ["Logarithmic axis."] if shown.log else []
    notes += [f"{counted(shown.left_out, 'outlying value')} beyond the axis."] if shown.left_out else []
    notes += ["Bands go on beyond the axis."] if shown.cut else []
    notes += [
        f"{what[0].upper()}{what[1:]}: {show(curve.key, value)}, beyond the axis."
        for value, what in lines
        if not shown.low <= value <= shown.high
    ]
    aim = f" <small>{known.better} is better</small>" if known.better and curve.key != "time/images_per_second" else ""
    data = [
        [view.comparison.groups[i].name, i, [[p.step, *_rounded(p.mean, p.low, p.high)] for p in groups[i]]]
        for i in view.order
        if groups[i]
    ]
    unit = "%" if percent else known.unit
    told = json.dumps({"unit": unit, "groups": data}, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<figure class="card"><figcaption><h3>{_(known.label)}{_(f", {known.unit}" if known.unit else "")}{aim}</h3>'
        f"<p>{_(' '.join(notes))}</p></figcaption>{svg}"
        f'<script type="application/json">{told}</script></figure>'
    )


def _rounded(*values: float | None) -> list[float]:
    return [float(f"{v:.4g}") for v in values if v is not None]


# ---- pictures, runs, words


def pictures(view: View, drawn: Sequence[Picture]) -> str:
    if not drawn:
        return ""
    what = "the same photographs" if view.comparison.task == "upscale" else "the same latents"
    places = {group.name: i for i, group in enumerate(view.comparison.groups)}
    rank = {place: at for at, place in enumerate(view.order)}
    figures = []
    for picture in sorted(drawn, key=lambda p: rank[places[p.group]]):
        place = places[picture.group]
        source = f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"
        run = "" if picture.run == picture.group else f"{picture.run}, "
        figures.append(
            f'<figure class="card picture" id="p{place}"><a href="#p{place}" aria-label="Enlarge {_(picture.group)}">'
            f'<img src="{source}" width="{picture.width}" height="{picture.height}" alt="Samples of {_(picture.group)}"></a>'
            f"<figcaption><h3>{name_of(view, place)}</h3><p>{_(run + picture.caption)}</p></figcaption>"
            '<a class="close" href="#pictures" aria-label="Close">×</a></figure>'
        )
    wide = " wide" if view.comparison.task == "upscale" else ""
    return (
        f'<section id="pictures"><h2>Samples</h2><p class="quiet">Of {what}, place by place. Click to enlarge'
        f'<span class="scripted">; arrow keys then go from run to run</span>.</p><div class="pictures{wide}">{"".join(figures)}</div></section>'
    )


def runs(view: View) -> str:
    heads = ["run", "seed", "state", "steps", "folder"]
    rows, remarks = [], []
    for i in view.order:
        for m in view.comparison.groups[i].members:
            told = _(m.state) if m.state == "finished" else f'<span class="bad">{_(m.state)}</span>'
            rows.append(
                [
                    f"{chip(view, i)}{_(m.name)}",
                    str(m.seed),
                    told,
                    f"{m.step:,} of {m.steps:,}",
                    f"<code>{_(m.path)}</code>",
                ]
            )
            said = ([f"<li>{_(m.message)}</li>"] if m.message else []) + [
                f"<li>step {step:,}: {_(sentence)}</li>" for step, sentence in m.remarks[-3:]
            ]
            remarks += [f"<h3>{chip(view, i)}{_(m.name)}</h3><ul>{''.join(said)}</ul>"] if said else []
    parts = [
        f"<section><h2>Runs</h2><details><summary>All {len(rows)} runs</summary>{table('cards words', heads, rows)}</details>"
    ]
    if remarks:
        parts.append(f"<details><summary>What was noticed in their training</summary>{''.join(remarks)}</details>")
    return "".join([*parts, "</section>"])


def measures(view: View) -> str:
    keys = [column.key for column in view.comparison.columns] + [curve.key for curve in view.comparison.curves]
    known = {m.label: m.about for m in map(measure, keys) if m.about}
    words = "".join(f"<dt>{_(label)}</dt><dd>{_(about)}</dd>" for label, about in known.items())
    return (
        f"<section><details><summary>What the measures mean</summary><dl>{words}</dl></details></section>"
        if words
        else ""
    )
