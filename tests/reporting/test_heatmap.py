from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

from ders.compression.findings import Analysis, BaseChoice, LayerFindings, MatrixFindings, Spectrum, Verdict
from ders.reporting import heatmap
from ders.reporting.heatmap import draw_deltas, draw_similarity

VERDICT = Verdict(True, 0.9, 2, 0.9997, 0.02, 3.0, [])


def matrix(num_experts: int, cosine: float) -> MatrixFindings:
    size = num_experts + 1
    cosines = [[1.0 if i == j else cosine for j in range(size)] for i in range(size)]
    spectrum = Spectrum([1, 2, 4], [[0.1, 0.2, 0.5], *[None] * (num_experts - 1)])
    return MatrixFindings((48, 32), cosines, [0.02] * num_experts, [3.0] * num_experts, spectrum)


def analysis(*, num_layers: int = 2, num_experts: int = 4, cosine: float = 0.9997, kind: str = "given") -> Analysis:
    names = ("gate_proj", "up_proj", "down_proj")
    layers = [LayerFindings(2 * i, {n: matrix(num_experts, cosine) for n in names}) for i in range(num_layers)]
    base = BaseChoice(kind, "dense")
    return Analysis("moe", base, "bfloat16", num_experts, 2, None, False, layers, VERDICT)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[plt.Figure]:
    """The figures, before they are closed."""
    figures: list[plt.Figure] = []
    monkeypatch.setattr(heatmap, "save", lambda figure, file: (figures.append(figure), file)[1])
    yield figures
    for figure in figures:
        plt.close(figure)


def texts(axis: plt.Axes) -> list[str]:
    return [text.get_text() for text in axis.texts]


def test_files_are_written(tmp_path: Path) -> None:
    for draw in (draw_similarity, draw_deltas):
        file = draw(analysis(), tmp_path / "new" / f"{draw.__name__}.png")
        assert file.read_bytes().startswith(b"\x89PNG")
    assert not plt.get_fignums()


@pytest.mark.parametrize(
    ("cosine", "expected"), [(0.9997, "0.99970"), (0.03, "0.03"), (0.9948, "0.9948"), (1.0, "1.0000000")]
)
def test_numbers_can_be_told_from_one(cosine: float, expected: str, drawn: list[Any], tmp_path: Path) -> None:
    draw_similarity(analysis(cosine=cosine), tmp_path / "a.png")
    axis = drawn[0].axes[0]
    assert texts(axis)[:3] == ["1", expected, expected]
    assert axis.images[0].get_clim() == (min(cosine, 1 - 1e-6), 1)
    assert [label.get_text() for label in axis.get_xticklabels()] == ["FFN", "E1", "E2", "E3", "E4"]


def test_many_layers_show_the_first_and_the_last(drawn: list[Any], tmp_path: Path) -> None:
    draw_similarity(analysis(num_layers=12, kind="mean"), tmp_path / "a.png")
    *maps, _ = drawn[0].axes
    assert [axis.get_title() for axis in maps[::3]] == ["layer 0, gate_proj", "layer 22, gate_proj"]
    assert maps[0].get_xticklabels()[0].get_text() == "mean"


def test_many_experts_are_colours_only(drawn: list[Any], tmp_path: Path) -> None:
    draw_similarity(analysis(num_experts=16), tmp_path / "a.png")
    assert not texts(drawn[0].axes[0])


def test_sizes_and_spectra(drawn: list[Any], tmp_path: Path) -> None:
    draw_deltas(analysis(num_layers=5), tmp_path / "a.png")
    sizes, spectra = drawn[0].axes
    assert {y for line in sizes.lines for y in line.get_ydata()} == {2.0}
    # A delta of zeros has no spectrum: the mean is over the others. Three of five layers, three matrices.
    assert len(spectra.lines) == 9
    assert list(spectra.lines[0].get_ydata()) == pytest.approx([10, 20, 50])
    assert spectra.lines[-1].get_label() == "8 down_proj"


def test_without_spectra_there_is_one_panel(drawn: list[Any], tmp_path: Path) -> None:
    whole = analysis()
    layers = [
        LayerFindings(layer.index, {n: replace(m, spectrum=None, ratios=[0.0] * 4) for n, m in layer.matrices.items()})
        for layer in whole.layers
    ]
    draw_deltas(replace(whole, layers=layers), tmp_path / "a.png")
    (sizes,) = drawn[0].axes
    assert sizes.get_ylim() == (0, 1)
