"""The figures of the evidence draw the numbers that they are given."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from test_evidence_changes import run_of, sequence
from test_evidence_directions import stages
from test_evidence_overlap import scores

from surgery import Neurons
from surgery.evidence import changes, directions, overlap, profile

pytest.importorskip("matplotlib")
from surgery.plots.evidence import change_histogram, directional_cosine, layer_lines, overlap_matrix, profile_bars


@pytest.mark.parametrize("what", ["absolute", "relative"])
@pytest.mark.parametrize("against", ["base", "before"])
def test_histograms_draw_the_share_of_every_octave(what, against, tmp_path: Path):
    found = changes(run_of(sequence("qwen3")))
    ax = change_histogram(found, what, against)
    steps = found.cumulative if against == "base" else found.incremental
    for patch, step in zip(ax.patches, steps, strict=True):
        held = getattr(step.whole, what)
        values, edges, _ = patch.get_data()
        assert list(edges) == pytest.approx(list(held.edges))
        assert list(values) == pytest.approx([100 * count / step.whole.parameters for count in held.counts])
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels[1].startswith("s2 − s0" if against == "base" else "s2 − s1")
    assert any(list(line.get_xdata()) == [getattr(found, what)] * 2 for line in ax.get_lines())
    ax.figure.savefig(tmp_path / "figure.png")


def test_a_stage_without_change_is_in_the_legend(tmp_path: Path):
    state = {"a": torch.ones(3)}
    ax = change_histogram(changes(run_of([state, state])))
    assert "100.0 % unchanged" in ax.get_legend().get_texts()[0].get_text()
    ax.figure.savefig(tmp_path / "figure.png")
    with pytest.raises(ValueError, match="expected"):
        change_histogram(changes(run_of([state, state])), against="later")


def test_matrices_draw_jaccard_and_chance(tmp_path: Path):
    found = overlap({name: scores(at) for at, name in enumerate("xyz")}, 0.1)
    ax = overlap_matrix(found, title="changed")
    assert ax.images[0].get_array().tolist() == [list(row) for row in found.jaccard]
    assert {text.get_text() for text in ax.texts} >= {"1.00", f"{found.of('x', 'y'):.2f}\n({found.chance[0][1]:.2f})"}
    assert ax.get_title() == "changed neurons, top 10 %"
    ax.figure.savefig(tmp_path / "figure.png")


def test_directions_draw_means_and_bands(tmp_path: Path):
    found = directions(run_of(stages("qwen3")), top=0.4, permutations=50)
    ax = directional_cosine(found, [("s1", "s3")])
    line = next(line for line in ax.get_lines() if line.get_label() == "s1–s3")
    means = [one.mean for one in found.of("s1", "s3").blocks]
    assert list(line.get_ydata()) == pytest.approx(means)
    low = min(one.null[0] for one in found.of("s1", "s3").blocks if one.null)
    assert float(ax.collections[0].get_paths()[0].vertices[:, 1].min()) == pytest.approx(low)
    assert len(directional_cosine(found).get_legend().get_texts()) == 3
    directional_cosine(directions(run_of(stages("qwen3")), top=0.02, permutations=5)).figure.savefig(tmp_path / "f.png")


def test_layers_draw_the_numbers_they_are_given():
    ax = layer_lines({"a": [1.0, None, 3.0], "b": [0.5, 0.5, 0.5]}, "change (%)")
    assert list(ax.get_lines()[0].get_ydata()) == pytest.approx([1.0, math.nan, 3.0], nan_ok=True)
    assert [line.get_label() for line in ax.get_lines()] == ["a", "b"]
    assert (ax.get_ylabel(), ax.get_ylim()[0]) == ("change (%)", 0)


def test_profiles_draw_shares_by_kind():
    mask = Neurons({"l.0.attn[kv_group]": torch.tensor([True, False]), "l.0.mlp": torch.ones(3, dtype=torch.bool)})
    ax = profile_bars(profile(mask))
    assert sorted(patch.get_height() for patch in ax.patches) == [25.0, 75.0]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["mlp", "kv_group"]
