import math
import struct
import subprocess
import sys
import threading

import pytest

from forge import ConflictError
from forge.reporting import Chart, Series
from forge.reporting.charts import DPI, SIZE

NAN, INF = math.nan, math.inf
TRAIN = Series("train", range(1, 31), [1 / step for step in range(1, 31)])


def chart(*series, **options):
    return Chart("Loss", series, **options)


def lines(drawn):
    return drawn.figure().axes[0].get_lines()


def written(drawn):
    """All that stands on the chart, but for the ticks."""
    axes = drawn.figure().axes[0]
    return [text.get_text() for text in axes.texts] + [axes.get_xlabel(), axes.get_ylabel(), axes.get_title("left")]


def test_a_png_of_the_promised_size(tmp_path):
    png = chart(TRAIN).png()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", png[16:24]) == tuple(int(side * DPI) for side in SIZE) == (1200, 660)
    chart(TRAIN).save(tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes() == png
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_not_finite_leaves_a_gap_and_a_red_tick(bad):
    drawn = chart(Series("train", (1, 2, 3, 4, 5), (3.0, 2.0, bad, 1.5, 1.0)))
    line, flags = lines(drawn)
    assert list(line.get_xdata()) == [1, 2, 3, 4, 5]
    assert [math.isnan(y) for y in line.get_ydata()] == [False, False, True, False, False]
    assert list(flags.get_xdata()) == [3]
    assert list(flags.get_ydata()) == [0]
    assert "red: not finite" in written(drawn)
    assert "1 of 5 not finite" in drawn.alt


def test_a_flag_does_not_move_the_axis():
    with_flag = chart(Series("train", (1, 2, 3), (1001.0, NAN, 1002.0))).figure().axes[0]
    assert 1000 < with_flag.get_ylim()[0] < with_flag.get_ylim()[1] < 1003


def test_nothing_finite_is_still_a_chart():
    drawn = chart(Series("train", (1, 2, 3), (NAN, INF, NAN)))
    assert list(lines(drawn)[1].get_xdata()) == [1, 2, 3]
    low, high = drawn.figure().axes[0].get_xlim()
    assert low < 1 < 3 < high
    assert "no finite value" in written(drawn)
    assert drawn.png()


@pytest.mark.parametrize("series", [(), (Series("train", (), ()),), (Series("a", [], []), Series("b", [], []))])
def test_nothing_recorded_says_so(series):
    drawn = chart(*series, log_y=True, marks=((3, "epoch 1"),))
    assert "nothing recorded" in written(drawn)
    assert drawn.alt.endswith("Nothing recorded.")
    assert drawn.png()


def test_a_point_that_no_line_reaches_has_a_marker():
    single = lines(chart(Series("train", (5,), (1.25,))))[0]
    assert (single.get_marker(), single.get_markevery()) == ("o", [0])
    values = [float(step) for step in range(30)]
    values[9] = values[11] = NAN
    assert lines(chart(Series("train", range(30), values)))[0].get_markevery() == [10]
    assert lines(chart(TRAIN))[0].get_markevery() == []


def test_a_single_step_has_whole_neighbours():
    axes = chart(Series("train", (5,), (1.25,))).figure().axes[0]
    assert axes.get_xlim() == (4, 6)
    assert all(float(tick).is_integer() for tick in axes.get_xticks())


@pytest.mark.parametrize(
    "values", [(0.0, -1.0, 0.0), (1.0, 0.0, 10.0), (1e-320, 1e-9, 1e38), (2.0, 2.0, 2.0), (1.0, NAN, -1.0)]
)
def test_a_logarithmic_axis_takes_any_values(values):
    drawn = chart(Series("norm", (1, 2, 3), values), log_y=True)
    assert drawn.png()
    assert drawn.figure().axes[0].get_yscale() == ("log" if max(values) > 0 else "linear")


def test_zero_on_a_logarithmic_axis_is_flagged_and_not_called_infinite():
    drawn = chart(Series("norm", (1, 2, 3), (1.0, 0.0, 10.0)), log_y=True)
    line, flags = lines(drawn)
    assert math.isnan(line.get_ydata()[1])
    assert list(flags.get_xdata()) == [2]
    assert "grey: zero or below" in written(drawn)
    assert "red: not finite" not in written(drawn)
    assert "not finite" not in drawn.alt


@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize("size", [1e-300, 1e-38, 1.0, 3.4e38, 1e300])
def test_sizes_that_diverging_runs_reach(size, log_y):
    assert chart(Series("loss", (1, 2, 3), (size, 1.0, -size)), log_y=log_y).png()


def test_names_stand_at_the_lines_where_there_is_more_than_one():
    assert "train" not in written(chart(TRAIN))
    both = chart(TRAIN, Series("evaluation", (1, 10, 20, 30), (1.0, 0.1, 0.05, 0.034)))
    assert {"train", "evaluation"} <= set(written(both))
    heights = sorted(text.get_position()[1] for text in both.figure().axes[0].texts)
    assert heights[1] - heights[0] >= 0.07


def test_twenty_lines_can_be_told_apart():
    drawn = chart(*(Series(f"layer {i}", (1, 2), (1.0, 1.0)) for i in range(20)))
    assert len({(line.get_color(), line.get_linestyle()) for line in lines(drawn)}) == 20
    heights = [text.get_position()[1] for text in drawn.figure().axes[0].texts]
    assert len(set(heights)) == 20
    assert max(heights) <= 1


def test_marks_are_dashed_lines_with_labels_that_do_not_overlap():
    marks = ((10, "epoch 1"), (11, "skipped"), (20, "epoch 2"))
    axes = chart(TRAIN, marks=marks).figure().axes[0]
    assert [line.get_xdata()[0] for line in axes.get_lines()[1:]] == [10, 11, 20]
    rows = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert rows["epoch 1"] == rows["epoch 2"] < rows["skipped"]
    assert "Marked: epoch 1 at 10, skipped at 11, epoch 2 at 20." in chart(TRAIN, marks=marks).alt


def test_a_crowd_of_marks_leaves_room_for_the_chart():
    drawn = chart(TRAIN, marks=tuple((step, f"checkpoint {step}") for step in range(1, 31)))
    assert len(drawn.figure().axes[0].texts) < 30
    assert drawn.png()
    assert "checkpoint 30 at 30" in drawn.alt


@pytest.mark.parametrize("text", ["$\\frac$ costs $5", "漢字 \N{ROCKET}", "W" * 400, "two\nlines\x00", "_hidden", ""])
def test_any_text_can_be_a_label(text):
    series = (Series(text, (1, 2), (1, NAN)), Series(text, (1, 2), (0, 2)))
    assert Chart(text, series, y_label=text, x_label=text, log_y=True, marks=((1, text), (2, text))).png()


def test_long_names_keep_both_ends():
    name = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    (shown,) = [text for text in written(chart(TRAIN, Series(name, (1,), (1,)))) if "…" in text]
    assert shown.startswith("model.")
    assert shown.endswith(".weight")


def test_ticks_are_numbers_as_people_write_them():
    figure = chart(
        Series("rate", range(0, 20_001, 2000), [2e-4 - step * 1e-8 for step in range(0, 20_001, 2000)])
    ).figure()
    figure.canvas.draw()
    across, up = (
        [tick.get_text() for tick in axis.get_ticklabels()] for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis)
    )
    assert {"10k", "20k"} <= set(across)
    assert {"5e-5", "1e-4"} <= set(up)


def test_lists_that_go_on_growing_do_not_change_the_chart():
    steps, values = [1], [2.0]
    series = Series("train", steps, values)
    steps.append(2)
    values.append(NAN)
    assert (series.x, series.y) == ((1.0,), (2.0,))


def test_impossible_series_are_refused():
    with pytest.raises(ConflictError, match="2 x and 1 y"):
        Series("train", (1, 2), (1.0,))
    with pytest.raises(ConflictError, match="'train' has an x that is not finite"):
        Series("train", (1, NAN), (1.0, 2.0))
    with pytest.raises(ConflictError, match="'epoch' of chart 'Loss' stands at nan"):
        chart(TRAIN, marks=((NAN, "epoch"),))


def test_nothing_global_is_touched():
    # dict(rcParams) instead of its copy() would itself import pyplot, to find a backend.
    code = (
        "import sys; from forge.reporting import Chart, Page, Series; assert 'matplotlib' not in sys.modules;"
        "import matplotlib; before = matplotlib.rcParams.copy();"
        "Chart('Loss', (Series('a', (1, 2), (1, 2)), Series('b', (1, 2), (2, 1))), log_y=True).png();"
        "assert matplotlib.rcParams.copy() == before; assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_the_same_picture_from_any_thread():
    here, there = chart(TRAIN).png(), []
    threads = [threading.Thread(target=lambda: there.append(chart(TRAIN).png())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert there == [here] * 3
