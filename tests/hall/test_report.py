"""Tables and figures: what is written, and that nothing else is touched."""

import numpy as np
import pytest

from blogkeras import report


def test_table_shows_every_cell_however_narrow_the_terminal(
    capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "20")
    names = [f"a rather long heading {i}" for i in range(6)]
    report.print_table(names, [[1, 0.123456, "x", "对抗", 2.5e-9, None]], "T")
    out = capsys.readouterr().out
    for text in (*names, "1", "0.1235", "x", "对抗", "2.5e-09", "None", "T"):
        assert text in out


def test_table_refuses_ragged_rows():
    with pytest.raises(ValueError, match=r"one cell .*row=\[1\]"):
        report.print_table(["a", "b"], [[1]])


@pytest.mark.parametrize(
    ("name", "start"),
    [("f.png", b"\x89PNG\r\n"), ("new/f.svg", b"<?xml"), ("f.pdf", b"%PDF")],
)
def test_figure_has_the_format_of_its_ending(tmp_path, name, start):
    path = tmp_path / name
    lines = {"plain": [1, 2, 3], "FGM": [1.0, 1.5, 1.7]}
    assert report.line_figure(
        path, [0, 1, 2], lines, "x", "y", title="t"
    ) == str(path)
    assert path.read_bytes().startswith(start)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_figure_holds_the_data(tmp_path, monkeypatch):
    figures = []
    save = report.save_figure
    monkeypatch.setattr(
        report,
        "save_figure",
        lambda figure, path: figures.append(figure) or save(figure, path),
    )
    report.line_figure(
        tmp_path / "f.png", [0, 1], {"a": [3, 4], "b": [5, 6]}, "across", "up"
    )
    (axes,) = figures[0].axes
    drawn = {
        line.get_label(): line.get_xydata().tolist() for line in axes.lines
    }
    assert drawn == {"a": [[0, 3], [1, 4]], "b": [[0, 5], [1, 6]]}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("across", "up")
    assert axes.get_legend() is not None


def test_figure_appears_complete_or_not_at_all(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def interrupted(self, path, **kwargs):
        with open(path, "wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    path = tmp_path / "f.png"
    path.write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", interrupted)
    with pytest.raises(KeyboardInterrupt):
        report.line_figure(path, [0], {"a": [1]}, "x", "y")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_figure_leaves_the_global_state_of_matplotlib_alone(tmp_path):
    import matplotlib
    import matplotlib.pyplot as plt

    before = dict(matplotlib.rcParams)
    report.line_figure(tmp_path / "f.png", [0], {"a": [1]}, "x", "y")
    assert plt.get_fignums() == []
    assert dict(matplotlib.rcParams) == before


def test_figure_errors(tmp_path):
    with pytest.raises(ValueError, match="Received: 2 and, for 'a', 1"):
        report.line_figure(tmp_path / "f.png", [0, 1], {"a": [1]}, "x", "y")
    with pytest.raises(ValueError, match="ends in the format"):
        report.line_figure(tmp_path / "f", [0], {"a": [1]}, "x", "y")


def test_heat_map(tmp_path):
    matrix = np.array([[1.0, 0.25, 0.0], [0.5, 0.75, 0.1]])
    path = tmp_path / "new" / "map.png"
    assert report.heat_map(path, matrix, "ab", "cde", "x", "y", "t") == str(
        path
    )
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="Received: 3 and 2"):
        report.heat_map(path, matrix, "abc", "de")


def test_pictures_stand_in_rows(tmp_path):
    rows = {"zeros": np.zeros((3, 4, 4, 1)), "ones": np.ones((3, 4, 4, 1))}
    path = report.picture_rows(tmp_path / "new/rows.png", rows)
    pixels = pytest.importorskip("matplotlib.image").imread(path)[..., 0]
    height, width = pixels.shape
    # The right edge of the figure, through the middle of each row.
    column = pixels[:, width - width // 20]
    assert column[height // 4] == 0
    assert column[3 * height // 4] == 1
    with pytest.raises(ValueError, match="one shape"):
        report.picture_rows(path, {**rows, "other": np.ones((2, 4, 4, 1))})
