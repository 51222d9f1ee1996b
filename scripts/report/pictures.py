"""Sample pictures and clips, side by side from the same noise, over the course of training."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from scripts.report.boards import TEACHER_ROLE, Board
from scripts.report.data import Picture, Run
from scripts.report.embedded import FEWEST_BYTES, Album, thinned
from scripts.report.findings import figure
from scripts.report.groups import Group

SHOWN_WIDTH = 360
"""Tiny pictures are enlarged by a whole factor to about this width, in CSS pixels."""

MOST_SHOWN_AT_ONCE = 24


@dataclass(frozen=True)
class Place:
    """Where a run's pictures of one role and step count are shown.

    Attributes:
        pinned: whether it stays at its last picture while others go through training: a teacher.
    """

    group: Group
    run: Run
    role: str
    num_steps: int
    pictures: Sequence[Picture]
    pinned: bool

    @property
    def last(self) -> Picture:
        """The picture of the most updates."""
        return self.pictures[-1]


def pictures_section(
    groups: Sequence[Group], boards: Sequence[Board], notes: list[str], budget: int
) -> tuple[str, dict[str, str]]:
    """All pictures by step count, and their data by key; damaged ones are added to the notes."""
    places = _places(groups)
    if not places:
        return '<p class="note">None of these runs has sample pictures.</p>', {}
    places, said = _fitted(places, budget)
    album = Album(list(_files(places)), budget)
    notes += [f"The picture {p} cannot be read ({why})." for p, why in album.damaged.items()]
    shrunk = sum(picture.shrunk for picture in album.found.values())
    if shrunk:
        said.append(f"{shrunk} of {len(album.found)} pictures are smaller here than their files")
    parts = [f'<p class="note">{escape(_noise_note(groups))}</p>', _budget_note(said, budget)]
    counts = sorted({place.num_steps for place in places})
    usual = max(counts, key=lambda n: sum(place.num_steps == n for place in places))
    chosen = str(usual) if len(places) > MOST_SHOWN_AT_ONCE else "all"
    parts.append(_controls(places, album, counts, chosen))
    for steps in counts:
        figures = [_figure(p, album, boards) for p in places if p.num_steps == steps]
        title = f"{steps} step{'s' * (steps != 1)}"
        away = " hidden" * (chosen not in ("all", str(steps)))
        parts.append(
            f'<div class="steps" data-steps="{steps}"{away}><h3>{title}</h3>'
            f'<div class="pictures">{"".join(figures)}</div></div>'
        )
    return "".join([*parts, _prompts(groups)]), album.data


def _places(groups: Sequence[Group]) -> list[Place]:
    """Teachers first, then in the order of the groups."""
    found: dict[tuple[int, str, int], list[Picture]] = {}
    runs = {run.position: (group, run) for group in groups for run in group.runs}
    for position, (_, run) in runs.items():
        for picture in run.pictures:
            key = (position, picture.role, picture.num_steps)
            found.setdefault(key, []).append(picture)
    teachers = {key for key in found if key[1] == TEACHER_ROLE or runs[key[0]][0].is_teacher}
    pinned = teachers if len(teachers) < len(found) else set()
    return [
        Place(*runs[key[0]], *key[1:], pictures[-1:] if key in pinned else pictures, key in pinned)
        for key, pictures in sorted(found.items(), key=lambda item: item[0] not in teachers)
    ]


def _files(places: Sequence[Place]) -> Iterator[Path]:
    for place in places:
        for picture in place.pictures:
            yield picture.path
            if picture.clip is not None:
                yield picture.clip


def _fitted(places: Sequence[Place], budget: int) -> tuple[list[Place], list[str]]:
    """Fewer stages of training where all would leave each picture too few bytes."""
    sizes = [path.stat().st_size for path in _files(places)]
    if sum(sizes) <= budget or len(sizes) * FEWEST_BYTES <= budget:
        return list(places), []
    most = max(len(place.pictures) for place in places)
    fitting = list(places)
    while most > 1 and len(list(_files(fitting))) * FEWEST_BYTES > budget:
        most = max(1, most - max(1, most // 4))
        fitting = [_thinned(place, most) for place in places]
    return fitting, [f"at most {most} stages of training are kept"]


def _thinned(place: Place, most: int) -> Place:
    kept = thinned(range(len(place.pictures)), most)
    pictures = [place.pictures[i] for i in kept]
    return Place(place.group, place.run, place.role, place.num_steps, pictures, place.pinned)


def _budget_note(said: Sequence[str], budget: int) -> str:
    if not said:
        return ""
    return (
        f'<p class="note budget">To keep the page\'s pictures within {budget / 1e6:.3g} MB, '
        f"{escape(' and '.join(said))}; --max-megabytes allows more.</p>"
    )


def _noise_note(groups: Sequence[Group]) -> str:
    """Whether all pictures start from the same noise, as far as the configurations tell."""
    key = "trainer.callbacks[Samples].init_args.seed"
    runs = [run for group in groups for run in group.runs if run.pictures]
    seeds = {str(run.config[key]) for run in runs if key in run.config}
    if len(seeds) > 1:
        return (
            f"Careful: these runs drew their pictures from different noise (seeds "
            f"{', '.join(sorted(seeds))})."
        )
    return (
        "All pictures are made from the same noise and the same conditions, in the same order, so "
        "the same place in two pictures of one data set shows what each made of the same start."
    )


def _controls(places: Sequence[Place], album: Album, counts: Sequence[int], chosen: str) -> str:
    """The slider over training, the choice of step counts, and what else changes the view."""
    moving = [place for place in places if not place.pinned]
    stages = sorted({picture.updates for place in moving for picture in place.pictures})
    parts = []
    if len(stages) > 1:
        parts.append(
            '<div class="slide"><label for="updates">Student updates</label>'
            '<button type="button" id="play" aria-pressed="false">Play</button>'
            f'<input type="range" id="updates" min="0" max="{len(stages) - 1}" step="1" '
            f'value="{len(stages) - 1}" data-stages="{json.dumps(stages)}">'
            f'<output for="updates">{stages[-1]}</output></div>'
        )
    if len(counts) > 1:
        parts.append(_choice(counts, chosen))
    if any(len(place.group.runs) > 1 for place in places):
        parts.append('<label><input type="checkbox" id="all-seeds"> all seeds</label>')
    if any(embedded.frames > 1 for embedded in album.found.values()):
        parts.append('<label><input type="checkbox" id="clips" checked> moving</label>')
    parts.append(
        '<label>Size <input type="range" id="size" min="150" max="1200" step="50" value="300">'
        "</label>"
    )
    return f'<div class="controls">{"".join(parts)}</div>'


def _choice(counts: Sequence[int], chosen: str) -> str:
    options = "".join(
        f'<option value="{value}"{" selected" * (str(value) == chosen)}>{value}</option>'
        for value in ("all", *counts)
    )
    return f'<label>Sampling steps <select id="shown-steps">{options}</select></label>'


def _figure(place: Place, album: Album, boards: Sequence[Board]) -> str:
    """A picture's frame; the page's script puts the picture of the chosen stage into it."""
    stages = [
        [picture.updates, _entry(album, picture.path), _entry(album, picture.clip)]
        for picture in place.pictures
        if picture.path in album.found
    ]
    if not stages:
        return ""
    last, run = place.last, place.run
    size = album.found[next(p.path for p in reversed(place.pictures) if p.path in album.found)]
    factor = max(1, round(SHOWN_WIDTH / size.width))
    remarks = [f"{place.role}, {place.num_steps} step{'s' * (place.num_steps != 1)}"]
    remarks += _values(place, boards)
    if last.updates != run.updates:
        remarks.append(f"after {last.updates} updates, not {run.updates}")
    remarks += ["made smaller for this page"] * size.shrunk
    label = f"Samples of {run.label}, {remarks[0]}"
    member = " data-member" if run is not place.group.first else ""
    name = place.group.label
    if len(place.group.runs) > 1:
        name += f", {place.group.shown(run)}"
    return (
        f'<figure data-group="{place.group.position}"{member}{" data-pinned" * place.pinned} '
        f'data-stages="{escape(json.dumps(stages))}">'
        f'<button type="button" class="zoom" aria-label="Enlarge: {escape(label)}">'
        f'<img class="{"tiny" if factor > 1 else ""}" width="{factor * size.width}" '
        f'height="{factor * size.height}" alt="{escape(label)}"></button>'
        f'<figcaption><i class="key" data-key="{place.group.position}"></i>'
        f"<b>{escape(name)}</b> <br>{escape(' · '.join(remarks))} "
        f'<span class="at">{last.updates} updates</span></figcaption></figure>'
    )


def _entry(album: Album, path: Path | None) -> list[str | int] | None:
    if path is None or path not in album.found:
        return None
    found = album.found[path]
    return [found.key, found.width, found.height]


def _values(place: Place, boards: Sequence[Board]) -> list[str]:
    """What was measured at the picture's role and step count, by the metrics that matter most."""
    return [
        f"{board.metric} {figure(row.of_run(place.run)[place.num_steps].mean)}"
        for board in boards[:3]
        for row in board.rows
        if row.role == place.role
        and row.group is place.group
        and place.num_steps in row.of_run(place.run)
    ]


def _prompts(groups: Sequence[Group]) -> str:
    """What the samples were asked to be; runs that asked for the same share one list."""
    asked: dict[tuple[str, ...], list[str]] = {}
    for group in groups:
        for run in group.runs:
            if run.prompts:
                asked.setdefault(tuple(run.prompts), []).append(run.label)
    parts = []
    for prompts, labels in asked.items():
        whose = f" of {', '.join(labels)}" if len(asked) > 1 else ""
        items = "".join(f"<li>{escape(prompt)}</li>" for prompt in prompts)
        parts.append(
            f"<details><summary>Prompts{escape(whose)}, in reading order</summary>"
            f'<ol class="prompts">{items}</ol></details>'
        )
    return "".join(parts)
