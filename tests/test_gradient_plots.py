"""Figures of gradient conflict draw the numbers that they are given."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from families import build
from test_gradient_cosines import domains

from surgery.evidence import Gradients, GradientSeries, gradients

pytest.importorskip("matplotlib")
from surgery.plots.evidence import gradient_courses, gradient_extremes, gradient_heatmap


@cache
def found(seed: int = 0) -> Gradients:
    return gradients(build("qwen3", seed=seed), domains("a", "b", "c"))


@pytest.mark.parametrize("kind", ["attention", "mlp", "norm"])
def test_a_heatmap_shows_every_pair_in_every_layer(kind: str, tmp_path: Path) -> None:
    ax = gradient_heatmap(found(), kind)
    (image,) = ax.get_images()
    parts = [part for part in found().modules if part.kind == kind]
    shown = [[part.cosines[a][b] for part in parts] for a, b in found().pairs]
    assert image.get_array().tolist() == shown
    assert image.get_clim()[0] == -image.get_clim()[1] == -max(abs(c or 0) for row in shown for c in row)
    assert gradient_heatmap(found(), kind, limit=0.5).get_images()[0].get_clim() == (-0.5, 0.5)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a–b", "a–c", "b–c"]
    assert len(ax.texts) == 6
    ax.figure.savefig(tmp_path / "figure.png")


def test_a_cosine_that_is_undefined_is_left_grey(tmp_path: Path) -> None:
    nothing = {a: dict.fromkeys("abc") for a in "abc"}
    parts = tuple(replace(part, cosines=nothing) if part.layer == 1 else part for part in found().modules)
    ax = gradient_heatmap(replace(found(), modules=parts))
    assert [text.get_text() for text in ax.texts].count("–") == 3
    assert ax.get_images()[0].get_array().mask[:, 1].all()
    ax.figure.savefig(tmp_path / "figure.png")


def test_bars_go_from_the_strongest_conflict_to_the_strongest_synergy() -> None:
    ax = gradient_extremes(found())
    widths = [bar.get_width() for bar in ax.patches]
    assert widths == sorted(pull.cosine for pull in (*found().conflicts, *found().synergies))
    first = (*found().conflicts, *reversed(found().synergies))[0]
    assert ax.get_yticklabels()[0].get_text().endswith(f"{first.first}–{first.second}")


@pytest.mark.parametrize("names", [("base", "math"), ("10", "250")])
def test_courses_are_lines_over_the_stages(names: tuple[str, str]) -> None:
    series = GradientSeries.over(dict(zip(names, (found(0), found(1)), strict=True)))
    ax = gradient_courses(series, "conflicts")
    lines = [line for line in ax.get_lines() if not line.get_label().startswith("_")]
    assert [tuple(line.get_ydata()) for line in lines] == [series.course(pull) for pull in series.conflicts]
    assert list(lines[0].get_xdata()) == ([10, 250] if names[0] == "10" else [0, 1])
    assert len(gradient_courses(series).get_lines()) == len(series.conflicts) + len(series.synergies) + 1


def test_what_can_not_be_drawn() -> None:
    with pytest.raises(ValueError, match="no layer has a module of the kind 'head'"):
        gradient_heatmap(found(), "head")
    with pytest.raises(ValueError, match="which='all'"):
        gradient_courses(GradientSeries.over({"base": found()}), "all")
