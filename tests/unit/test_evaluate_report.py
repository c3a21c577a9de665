"""What an evaluation writes and prints."""

import csv
import io
import json
import math

import pytest

from launch.evaluation.report import (
    Result,
    _worth,
    plot_png,
    printed_tables,
    table_csv,
    write_report,
)


def figures(loss, text=True, **more):
    words = 2 * loss if text else None
    return {
        **more,
        "frames": 750,
        "loss": 2 * loss if text else None,
        "padding_share": 0.75 if text else None,
        "text_loss": loss if text else None,
        "text_loss_without_padding": words,
        "audio_loss": loss,
        "audio_loss_1": loss + 0.5,
        "text_perplexity": None if words is None else math.exp(words),
        "audio_perplexity": math.exp(loss),
    }


def result(label, mode, losses, text=True):
    rows = [figures(loss, text, minute=n) for n, loss in enumerate(losses)]
    return Result(label, mode, figures(sum(losses) / len(losses), text), rows, {"seconds": 1.0})


RESULTS = [
    result("run/step-000004", "on", [1.5, 1.25]),
    result("run/step-000004", "off", [1.5, 2.0]),
    result("base, of it", "none", [3.0, 3.0]),
]


def test_a_row_a_model_mode_and_minute():
    rows = list(csv.DictReader(io.StringIO(table_csv(RESULTS))))
    assert [(row["checkpoint"], row["ttt"], row["minute"]) for row in rows] == [
        (each.label, each.ttt, str(minute)) for each in RESULTS for minute in (0, 1)
    ]
    for row, wanted in zip(rows, [row for each in RESULTS for row in each.by_minute], strict=True):
        assert {name: float(row[name]) for name in wanted} == wanted  # to the last digit


def test_nothing_to_predict_is_empty_and_null(tmp_path):
    silent = [result("run", "on", [1.0, math.nan], text=False)]
    (first, second) = csv.DictReader(io.StringIO(table_csv(silent)))
    assert (first["text_loss"], first["audio_loss"], second["audio_loss"]) == ("", "1.0", "")
    write_report(tmp_path, silent, {"recordings": 1}, complete=False)
    found = json.loads((tmp_path / "evaluation.json").read_text())
    (of_run,) = found["results"]
    assert (found["complete"], found["recordings"], of_run["seconds"]) == (False, 1, 1.0)
    assert of_run["by_minute"][0]["text_loss"] is None
    # A loss that isn't a number is told, not taken for none.
    assert (of_run["by_minute"][1]["audio_loss"], of_run["not_finite_from_minute"]) == (None, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"evaluation.{kind}" for kind in ("csv", "json", "png")
    ]
    assert "audio by minute" in printed_tables(silent)


def test_every_name_in_a_report_is_explained(tmp_path):
    write_report(tmp_path, RESULTS, {}, complete=True)
    found = json.loads((tmp_path / "evaluation.json").read_text())
    names = {name.replace("audio_loss_1", "audio_loss_K") for name in RESULTS[0].by_minute[0]}
    assert names <= found["meaning"].keys()
    assert [each["overall"] for each in found["results"]] == [each.overall for each in RESULTS]


def test_tables_are_read_line_by_line():
    lines = printed_tables(RESULTS).splitlines()
    assert " ".join(lines[0].split()) == "loss text words audio padding ppl words ppl audio"
    line = next(line for line in lines if line.startswith("run/step-000004, TTT off"))
    assert line.endswith("3.5000  1.7500  3.5000  1.7500   0.7500    33.1155     5.7546")
    assert "loss by minute" in printed_tables(RESULTS)
    assert lines[-4].split() == ["1", "2.5000", "4.0000", "6.0000"]
    assert lines[-3:] == [
        "(1) run/step-000004, TTT on",
        "(2) run/step-000004, TTT off",
        "(3) base, of it",
    ]


def test_what_ttt_is_worth_is_told_by_minute():
    assert _worth(RESULTS, "loss") == {1: {0: 0.0, 1: 1.5}}
    assert _worth(RESULTS[1:], "loss") == {}


@pytest.mark.parametrize("text", [True, False])
def test_the_plot_is_a_picture(text):
    png = plot_png([result("run", "on", [1.0, 2.0], text), result("base", "none", [3.0], text)])
    assert png.startswith(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    assert png.endswith(b"IEND\xaeB`\x82")
