"""Pictures and clips inside the page."""

from __future__ import annotations

import base64
import json
import re
from html import unescape
from pathlib import Path

import pytest
import torch
from PIL import Image

from callbacks.clips import encode
from callbacks.pictures import save_picture
from scripts.report.embedded import Album, allowance, thinned

from report_runs import LCM, METRIC, TEACHER, make_run, measured, page_of, section


def figures_of(page: str) -> list[tuple[list[int], bool]]:
    """The stages of training of each figure, and whether it is pinned to its last."""
    found = re.findall(r'<figure data-group="\d+"(.*?) data-stages="(.*?)"', page)
    return [
        ([stage[0] for stage in json.loads(unescape(stages))], "pinned" in flags)
        for flags, stages in found
    ]


def test_pictures_are_inside_the_page_with_their_numbers(demo: Path) -> None:
    page = page_of(demo)
    assert page.count(">data:image/png;base64,") == 5
    assert f"digits/pcm_4 ema, 4 steps · {METRIC} 0.315" in section(page, "samples")
    assert "same noise" in section(page, "samples")


def test_a_picture_that_two_runs_share_is_kept_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        folder = make_run(tmp_path, name, LCM, measured({4: 1.0}), pictures=False)
        image = torch.zeros(3, 9, 9, dtype=torch.uint8)
        save_picture(image, folder / "samples" / "00000600_teacher_4_steps.png")
    assert page_of(tmp_path).count("data:image/png;base64,") == 1


def test_students_move_through_training_and_teachers_stay(tmp_path: Path) -> None:
    make_run(tmp_path, "t", TEACHER, measured({4: 1.0}), updates=(10, 3000))
    make_run(tmp_path, "s", LCM, measured({4: 1.0}), updates=(250, 500))
    page = page_of(tmp_path)
    assert figures_of(page) == [([3000], True), ([250, 500], False)]
    assert 'data-stages="[250, 500]"' in page, "the slider knows the students' updates alone"


def test_teachers_alone_move_through_training(tmp_path: Path) -> None:
    make_run(tmp_path, "t", TEACHER, measured({4: 1.0}), updates=(10, 3000))
    assert figures_of(page_of(tmp_path)) == [([10, 3000], False)]


def test_clips_are_embedded_beside_their_stills(tmp_path: Path) -> None:
    make_run(tmp_path, "a", LCM, measured({4: 1.0}), clips=True)
    page = page_of(tmp_path)
    assert page.count(">data:image/webp;base64,") == 1
    assert 'id="clips"' in page
    ((_, still, moving),) = json.loads(
        unescape(re.findall(r'<figure [^>]*data-stages="(.*?)"', page)[0])
    )
    assert still[0] != moving[0]


def test_prompts_are_shown_once_for_the_runs_that_share_them(tmp_path: Path) -> None:
    for name in ("a", "b"):
        folder = make_run(tmp_path, name, LCM, measured({4: 1.0}))
        (folder / "samples" / "prompts.txt").write_text("a <b>red</b> fox\nan owl\n")
    text = page_of(tmp_path)
    assert text.count("<li>a &lt;b&gt;red&lt;/b&gt; fox</li><li>an owl</li>") == 1


def test_more_pictures_than_the_budget_become_smaller_and_the_page_says_so(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "a", LCM, measured({4: 1.0}), pictures=False)
    for n in (1, 2, 3):
        image = torch.randint(0, 255, (3, 200, 300), dtype=torch.uint8)
        save_picture(image, folder / "samples" / f"{n:08d}_ema_4_steps.png")
    page = page_of(tmp_path, max_megabytes=0.1)
    data = re.findall(r">(data:image/.*?)</script>", page)
    assert len(data) == 3
    assert sum(map(len, data)) * 3 / 4 < 0.11e6
    assert "within 0.1 MB, 3 of 3 pictures are smaller here than their files" in page


def test_far_too_many_pictures_become_fewer_and_keep_first_and_last(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "a", LCM, measured({4: 1.0}), pictures=False)
    for n in range(1, 21):
        image = torch.randint(0, 255, (3, 100, 100), dtype=torch.uint8)
        save_picture(image, folder / "samples" / f"{n:08d}_ema_4_steps.png")
    page = page_of(tmp_path, max_megabytes=0.06)
    (stages, _), *_ = figures_of(page)
    assert 2 <= len(stages) <= 5
    assert (stages[0], stages[-1]) == (1, 20)
    assert f"at most {len(stages)} stages of training are kept" in page


def test_a_clip_that_is_made_smaller_still_moves(tmp_path: Path) -> None:
    path = tmp_path / "clip.webp"
    frames = torch.randint(0, 255, (5, 3, 120, 120), dtype=torch.uint8)
    path.write_bytes(encode(frames, 8, "webp"))
    album = Album([path], 20_000)
    found = album.found[path]
    assert found.shrunk
    assert found.width < 120
    assert album.size < 28_000
    (tmp_path / "small.webp").write_bytes(base64.b64decode(album.data[found.key].split(",")[1]))
    with Image.open(tmp_path / "small.webp") as small:
        small.load()
        assert (small.n_frames, small.info["duration"]) == (5, 125)


@pytest.mark.parametrize(
    ("sizes", "budget", "allowed"),
    [([10, 10], 30, float("inf")), ([10, 100, 100], 110, 50), ([5, 5], 4, 2)],
)
def test_small_files_leave_their_share_to_large_ones(
    sizes: list[int], budget: int, allowed: float
) -> None:
    assert allowance(sizes, budget) == allowed


def test_thinning_keeps_the_ends() -> None:
    assert thinned(range(10), 4) == [0, 3, 6, 9]
    assert thinned(range(3), 4) == [0, 1, 2]
    assert thinned(range(3), 1) == [2]
