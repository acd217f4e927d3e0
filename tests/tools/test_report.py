"""The report command on run folders written by the real metrics callback."""

import base64
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from engine.callbacks.metrics import MetricsFile
from engine.record import RunInfo
from tools.report.__main__ import main
from tools.report.curves import PALETTE, to_svg
from tools.report.panels import folded_panels, panels
from tools.report.runs import config_differences, evenly_spaced, load_runs

VOID_TAGS = {"meta", "img", "br", "path", "use"}


class PageReader(HTMLParser):
    """Text, images and anything that would load or run; fails on tags that do not nest."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.images: list[str] = []
        self.tags: list[str] = []
        self._open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attributes = dict(attrs)
        for name in ("src", "href", "xlink:href"):
            if name in attributes:
                assert attributes[name].startswith(("data:image/png;base64,", "#")), attributes[name]
        assert not any(name.startswith("on") for name in attributes)
        if tag == "img":
            self.images.append(attributes["src"])
        if tag not in VOID_TAGS:
            self._open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID_TAGS:
            assert self._open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.text.append(data.strip())


def read_page(path: Path) -> PageReader:
    page = PageReader()
    page.feed(path.read_text(encoding="utf-8"))
    assert page._open == []
    return page


def png_base64(color: tuple[int, int, int]) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def write_run(
    run_dir: Path, *, steps: int = 30, batch: int = 256, learning_rate: float = 0.01, few: bool = False
) -> Path:
    """A run; few: with records of loss and speed alone, as drawing is what these tests take time for."""
    run_dir.mkdir()
    config = {"run_dir": str(run_dir), "optim": {"lr": learning_rate}, "train": {"steps": steps}}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    metrics = MetricsFile()
    metrics.on_start(
        RunInfo(
            run_dir=run_dir, config=config, total_steps=steps, start_step=0, world_size=1,
            layout="TP 1 × PP 1 × DP 1", parameters=1000, global_batch_size=batch,
        )
    )  # fmt: skip
    for step in range(steps):
        more = {
            "lr_vision": learning_rate, "lr_text": learning_rate / 10, "grad_norm": 1.5, "data_time_s": 0.05,
            "i2t_top1": step / steps, "t2i_top1": step / steps,
        }  # fmt: skip
        record = {"step": step, "loss": 5 - step / steps, "samples_seen": batch * (step + 1), "step_time_s": 0.5}
        metrics.on_step(record | ({} if few else more))
    metrics.on_end({})
    return run_dir


def add_evaluation(run_dir: Path, *, samples: int = 2) -> None:
    result = {
        "zero_shot_top1": 0.4, "chance": 0.004, "recall_at_1": 0.375, "recall_at_5": 0.8125,
        "layout": "TP 2 × PP 2 × DP 1", "seconds": 213.0,
    }  # fmt: skip
    (run_dir / "result.json").write_text(json.dumps(result))
    entries = [
        {
            "shard": "held-out.tar", "key": f"{index:05d}", "caption": f"cat {index}",
            "image_png_base64": png_base64((index, 0, 0)),
            "top": [{"caption": f"cat {index + place}", "score": 0.9 - place / 10} for place in (1, 0, 2)],
        }
        for index in range(samples)
    ]  # fmt: skip
    (run_dir / "predictions.json").write_text(json.dumps({"shards": ["held-out.tar"], "samples": entries}))


def _loss_svg(run_dirs: list[Path]) -> str:
    runs = load_runs(run_dirs)
    return to_svg(panels(runs)[0], runs)


def test_page_of_one_run_has_curves_evaluation_and_images(tmp_path, capsys):
    run_dir = write_run(tmp_path / "quickstart")
    add_evaluation(run_dir)
    assert main([str(run_dir)]) == 0
    assert capsys.readouterr().out.split() == [str(run_dir / "report.html")]
    page = read_page(run_dir / "report.html")
    titles = [panel.title for panel in panels(load_runs([run_dir]))]
    assert titles[:3] == ["Contrastive loss", "Top-1 within the batch", "Learning rate"] and len(titles) == 6
    assert page.tags.count("svg") == len(titles) and "script" not in page.tags and "link" not in page.tags
    for expected in (
        "quickstart",
        "30",
        "7,680",
        "512.0",
        "10 %",
        "15.0 s",
        "40 %",
        "100 ×",
        "37.5 %",
        "3 min 33 s",
        "TP 1 × PP 1 × DP 1",
        "1 k parameters",
        "256",
    ):
        assert expected in page.text, expected
    assert set(titles) <= set(page.text)
    assert page.images == [f"data:image/png;base64,{png_base64((index, 0, 0))}" for index in range(2)]
    html = (run_dir / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'class="guess right"><i>✓</i><span>(.*?)</span>', html) == ["cat 0", "cat 1"]
    assert "url(http" not in html and "@import" not in html


def test_two_runs_are_compared_with_their_config_differences(tmp_path):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", learning_rate=0.02)]
    out = tmp_path / "page.html"
    assert main([*map(str, runs), "--out", str(out)]) == 0
    page = read_page(out)
    assert "2 runs compared" in page.text and "Evaluation" not in page.text and page.images == []
    assert config_differences(load_runs(runs)) == [("optim.lr", ["0.01", "0.02"])]
    assert "optim.lr" in page.text and "train.steps" not in page.text
    svg = _loss_svg(runs)
    assert PALETTE[0] in svg and PALETTE[1] in svg and PALETTE[2] not in svg


def test_runs_of_different_batch_size_share_a_samples_axis(tmp_path):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", batch=512)]
    assert "samples seen" in _loss_svg(runs)
    assert "optimizer step" in _loss_svg(runs[:1])


def test_every_text_is_escaped(tmp_path):
    run_dir = write_run(tmp_path / "<b>$x_1$ & co")
    add_evaluation(run_dir, samples=1)
    attack = '"><script>alert(1)</script> $\\frac{$'  # the dollars would be broken mathematics in the picture
    content = json.loads((run_dir / "predictions.json").read_text())
    content["samples"][0]["caption"] = content["samples"][0]["top"][0]["caption"] = attack
    (run_dir / "predictions.json").write_text(json.dumps(content))
    (run_dir / "result.json").write_text(json.dumps({attack: attack}))
    other = write_run(tmp_path / "other", learning_rate=0.02)
    (other / "config.yaml").write_text(yaml.safe_dump({attack: attack}))
    out, png = tmp_path / "page.html", tmp_path / "picture.png"
    assert main([str(run_dir), str(other), "--out", str(out), "--png", str(png)]) == 0
    page = read_page(out)
    assert "script" not in page.tags and "b" not in page.tags[: page.tags.index("figure")]
    assert page.text.count(attack) >= 5 and "<b>$x_1$ & co" in page.text


def test_picture_shows_curves_and_images(tmp_path, capsys):
    run_dir = write_run(tmp_path / "quickstart")
    plain, with_images = tmp_path / "plain.png", tmp_path / "images.png"
    assert main([str(run_dir), "--png", str(plain)]) == 0
    add_evaluation(run_dir, samples=40)
    assert main([str(run_dir), "--png", str(with_images)]) == 0
    assert str(with_images) in capsys.readouterr().out
    with Image.open(plain) as first, Image.open(with_images) as second:
        assert first.width == second.width == 1560 and second.height > 2 * first.height
        colors = {color for _, color in second.convert("RGB").getcolors(1 << 24) or []}
        blue = tuple(bytes.fromhex(PALETTE[0][1:]))
        # The curve, and the last of the evenly spaced images: a square of (39, 0, 0).
        assert blue in colors and (39, 0, 0) in colors and (0, 0, 0) in colors


def test_long_curves_are_thinned_and_keep_their_extremes(tmp_path):
    run = load_runs([write_run(tmp_path / "long", steps=5000)])[0]
    run.records[2500]["loss"] = 77.0
    run.records[2600]["loss"] = None
    svg = to_svg(panels([run])[0], [run])
    assert len(svg) < 40_000 and ">60<" in svg  # the axis reaches the spike


def test_a_running_job_with_one_step_can_be_reported(tmp_path):
    run_dir = write_run(tmp_path / "run", steps=1, few=True)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')
    assert main([str(run_dir)]) == 0
    assert "512.0" in read_page(run_dir / "report.html").text


def test_runs_with_equal_folder_names_show_their_paths(tmp_path):
    for parent in ("x", "y"):
        (tmp_path / parent).mkdir()
        write_run(tmp_path / parent / "run")
    runs = load_runs([tmp_path / "x" / "run", tmp_path / "y" / "run"])
    assert [run.name for run in runs] == [str(tmp_path / "x" / "run"), str(tmp_path / "y" / "run")]


def test_throughput_follows_a_batch_size_that_changes(tmp_path):
    run = load_runs([write_run(tmp_path / "run", steps=4)])[0]
    run.records[3]["samples_seen"] += 256
    np.testing.assert_array_equal(run.samples_per_s(), [512, 512, 512, 1024])


def rewrite_records(run_dir: Path, change) -> None:
    """Every record of a run through `change(record)`."""
    path = run_dir / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(change(record)) + "\n" for record in records))


def _mim(record: dict) -> dict:
    return {key: value for key, value in record.items() if key not in ("lr_text", "i2t_top1", "t2i_top1")}


def test_a_run_without_captions_beside_one_with(tmp_path):
    mim, clip = write_run(tmp_path / "mim"), write_run(tmp_path / "clip")
    rewrite_records(mim, _mim)
    config = yaml.safe_load((mim / "config.yaml").read_text()) | {"objective": "mim", "model": {"preset": "tiny-18b"}}
    (mim / "config.yaml").write_text(yaml.safe_dump(config))
    assert main([str(mim), "--png", str(tmp_path / "mim.png")]) == 0
    page = read_page(mim / "report.html")
    assert "Masked-feature loss" in page.text and "Top-1 within the batch" not in page.text
    assert "tiny-18b, 1 k parameters, mim" in page.text
    (rate,) = (panel for panel in panels(load_runs([mim])) if panel.title == "Learning rate")
    assert len(rate.lines) == 1
    assert main([str(mim), str(clip), "--out", str(tmp_path / "both.html")]) == 0
    both = read_page(tmp_path / "both.html")
    assert {"Top-1 within the batch", "mim", "clip"} <= set(both.text)
    losses = [panel for panel in panels(load_runs([mim, clip])) if "loss" in panel.title]
    assert [panel.unit for panel in losses] == ["-cosine", "loss (nats)"], "an axis each"
    known = [
        [bool(np.isfinite(panel.lines[0].values(run)).any()) for run in load_runs([mim, clip])] for panel in losses
    ]
    assert known == [[True, False], [False, True]]


def test_evaluations_between_steps_have_charts_and_a_best_one(tmp_path):
    run_dir = write_run(tmp_path / "run")

    def evaluated(record: dict) -> dict:
        seldom = {
            "eval_zero_shot_top1": 0.5 - abs(record["step"] - 19) / 100,
            "eval_seconds_s": 3.0,
            "eval_chance": 0.1,
        }
        return record | (seldom if record["step"] % 10 == 9 else {})

    rewrite_records(run_dir, evaluated)
    runs = load_runs([run_dir])
    titles = [panel.title for panel in panels(runs)]
    assert titles[1:3] == ["Evaluation: zero-shot top-1", "Top-1 within the batch"], "what guessing gives is no chart"
    # Three values of thirty steps: each is a dot.
    assert to_svg(panels(runs)[1], runs).count("<use") > to_svg(panels(runs)[0], runs).count("<use")
    assert main([str(run_dir)]) == 0
    assert "50 % zero-shot top-1, step 20" in read_page(run_dir / "report.html").text


def test_what_belongs_together_shares_a_chart_and_nothing_is_drawn_twice(tmp_path):
    run_dir = write_run(tmp_path / "run", few=True)

    def evaluated(record: dict) -> dict:
        share = record["step"] / 40
        keys = ("zero_shot_top1", "zero_shot_top5", "recall_at_1", "image_to_text_recall_at_1", "average", "only_set")
        more = {f"set_{number}": share + number / 100 for number in range(5)}
        found = dict.fromkeys(keys, share) | {"text_to_image_recall_at_1": share / 2, "only_set": share / 3} | more
        return record | {f"eval_{key}": value for key, value in (found | {"average": share / 3}).items()}

    rewrite_records(run_dir, evaluated)
    runs = load_runs([run_dir])
    shown, folded = panels(runs), folded_panels(runs)
    charts = [panel for panel in [*shown, *folded] if panel.title.startswith("Evaluation")]
    assert [panel.title.removeprefix("Evaluation: ") for panel in charts] == [
        "zero-shot", "recall@1", "average", *(f"set {number}" for number in range(5)),
    ]  # fmt: skip
    assert [line.label for line in charts[1].lines] == ["image → text", "text → image"]
    assert {panel.unit for panel in charts} == {"%"} and len(folded) == 2
    assert main([str(run_dir)]) == 0
    assert "2 further evaluations" in read_page(run_dir / "report.html").text


def test_speed_and_memory_have_charts_where_they_were_measured(tmp_path):
    run_dir = write_run(tmp_path / "run", few=True)
    rewrite_records(run_dir, lambda record: record | {"mfu": 0.4, "memory_gb": 60 + record["step"] / 10})
    assert {"Model FLOPs utilisation", "Peak memory of a rank"} <= {
        panel.title for panel in panels(load_runs([run_dir]))
    }
    assert main([str(run_dir)]) == 0
    assert {"MFU", "62.9 GB"} <= set(read_page(run_dir / "report.html").text)


def test_phases_that_came_later_are_shown(tmp_path):
    run_dir = write_run(tmp_path / "run", few=True)
    rewrite_records(run_dir, lambda record: record | ({"phase": "late"} if record["step"] >= 20 else {}))
    assert main([str(run_dir)]) == 0
    page = read_page(run_dir / "report.html")
    assert {"Phases", "(before)", "1 to 20", "late", "21 to 30"} <= set(page.text)


def test_phases_are_listed_and_marked(tmp_path):
    run_dir = write_run(tmp_path / "run", few=True)
    rewrite_records(run_dir, lambda record: record | {"phase": "low <b>" if record["step"] < 20 else "high"})
    assert main([str(run_dir)]) == 0
    page = read_page(run_dir / "report.html")
    assert {"Phases", "low <b>", "high", "1 to 20", "21 to 30", "5,120", "2,560"} <= set(page.text)
    runs = load_runs([run_dir])
    assert ">high<" in to_svg(panels(runs)[0], runs) and ">low" not in to_svg(panels(runs)[0], runs)


def test_a_recorded_step_is_drawn(tmp_path):
    run_dir = write_run(tmp_path / "run", few=True)
    (run_dir / "timeline").mkdir()
    span = {"rank": 0, "tensor": 0, "pipeline": 0, "data": 0, "step": 7, "phase": "encode", "start_s": 0, "stop_s": 1}
    (run_dir / "timeline" / "rank_00000.jsonl").write_text(json.dumps(span) + "\n")
    assert main([str(run_dir)]) == 0
    page = read_page(run_dir / "report.html")
    assert "Timeline of a step" in page.text and len(page.images) == 1
    picture = base64.b64decode(page.images[0].removeprefix("data:image/png;base64,"))
    with Image.open(io.BytesIO(picture)) as image:
        assert image.width == 1950
    (run_dir / "timeline" / "rank_00001.jsonl").write_text("")
    assert main([str(run_dir)]) == 0  # a rank has not written yet
    page = read_page(run_dir / "report.html")
    assert page.images == [] and any("recorded by all 2 ranks" in text for text in page.text)


def test_samples_are_spread_over_the_list():
    assert evenly_spaced(range(100), 4) == [0, 33, 66, 99]
    assert evenly_spaced(range(3), 4) == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", None, "metrics.jsonl does not exist; give the run_dir"),
        ("metrics.jsonl", "", "metrics.jsonl has no finished step yet"),
        ("metrics.jsonl", 'x\n{"step": 1}\n', "metrics.jsonl, line 1: not a JSON object"),
        ("config.yaml", "a: [1", "config.yaml cannot be read"),
        ("result.json", "[]", "result.json must hold a mapping, not a list"),
        ("predictions.json", '{"samples": [{"caption": "x"}]}', "predictions.json is not a predictions file"),
        (
            "predictions.json",
            json.dumps({"samples": [{"caption": "x", "image_png_base64": "PHN2Zz4=", "top": []}]}),
            "an image is not a PNG",
        ),
    ],
)
def test_what_cannot_be_read_is_one_clear_line(tmp_path, capsys, name, content, message):
    run_dir = write_run(tmp_path / "run")
    (run_dir / name).unlink() if content is None else (run_dir / name).write_text(content)
    assert main([str(run_dir)]) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (run_dir / "report.html").exists()


def test_more_runs_than_colours_are_refused(tmp_path, capsys):
    assert main([str(tmp_path)] * (len(PALETTE) + 1)) == 1
    assert "at most 7" in capsys.readouterr().err


def test_command_line(tmp_path):
    run_dir = write_run(tmp_path / "run", few=True)
    command = [sys.executable, "-m", "tools.report", str(run_dir), "--out", str(tmp_path / "page.html")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "page.html").is_file()
