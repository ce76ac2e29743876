import base64
import datetime
import html.parser
import json
import math
import os
import re
import shutil

import pytest
from matplotlib.image import imread
from tiny_training import Sequences, arguments, gpt2
from written_runs import ADAMW_LOGS, ALSALS_LOGS, END_LOG, EVAL_LOGS, write_run

from hf_alsals import AlsalsTrainer
from hf_alsals.line_profile import LineProfileCallback
from hf_alsals.report import compare, load_run, report


class Page(html.parser.HTMLParser):
    """The text, the rows of tables and the images of a page."""

    def __init__(self, page):
        super().__init__()
        self.texts, self.rows, self.images = [], [], {}
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")
        elif tag == "img":
            self.images[dict(attrs)["alt"]] = dict(attrs)["src"]

    def handle_data(self, data):
        if self.lasttag in ("th", "td") and data.strip():
            self.rows[-1][-1] += data
        self.texts.append(data.strip())

    def cells(self):
        return {row[0]: row[1] for row in self.rows}

    def pixels(self, alt, tmp_path):
        head, data = self.images[alt].split(",")
        assert head == "data:image/png;base64"
        (tmp_path / "picture.png").write_bytes(base64.b64decode(data))
        return imread(tmp_path / "picture.png")[..., :3]


def has_color(pixels, color):
    wanted = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return (abs(pixels - wanted) < 0.02).all(axis=-1).sum() > 50


def test_the_summary_of_a_run(tmp_path):
    settings = {"optim": "salsa", "per_device_train_batch_size": 4}
    steps = {"settings": settings, "search_seconds": 2.0, "updated": "2024-05-06T07:08:09+00:00"}
    page = report(write_run(tmp_path / "run", [*ALSALS_LOGS, *EVAL_LOGS, END_LOG], StepSizeCallback=steps))
    assert "finished, last update 2024-05-06T07:08:09+00:00" in Page(page).texts
    assert "No warnings." in Page(page).texts
    assert Page(page).cells() == {
        "optimizer": "salsa",
        "optimizer steps": "40",
        "training loss, last": "0.075",
        "eval_loss, lowest": "0.25 (step 20)",
        "eval_loss, last": "0.375",
        "eval_accuracy, highest": "0.5 (step 20)",
        "eval_accuracy, last": "0.25",
        "step size of the search, last": "0.04",
        "step size taken, last": "0.001",
        "probes per step": "1.12",  # (10 * 3 + 30 * 0.5) / 40 = 1.125
        "time in the search": "25.0%",
        "steps per second": "5",
        "optim": "salsa",
        "per_device_train_batch_size": "4",
    }


def test_a_run_of_another_optimizer_has_no_pictures_of_a_search(tmp_path):
    page = Page(report(write_run(tmp_path, ADAMW_LOGS)))
    assert set(page.images) == {"loss", "step size"}
    assert page.cells()["optimizer"] == "not recorded"
    assert page.cells()["step size taken, last"] == "0.001"
    assert "probes per step" not in page.cells()


@pytest.mark.parametrize("c", [0.3, 0.125])
def test_the_armijo_ratio_is_drawn_with_the_c_of_the_run(c, tmp_path):
    ratio = "Armijo ratio, cut off at -1 and 2"
    pixels = []
    # The line lies on that of the ratio only where both are c.
    for name, value in (("at c", c), ("off c", c + 0.05)):
        steps = {"settings": {"optim": "alsals"}, "c": c}
        logs = [{**entry, "armijo_ratio": value} for entry in ALSALS_LOGS]
        run = write_run(tmp_path / name, logs, StepSizeCallback=steps)
        pixels.append(Page(report(run)).pixels(ratio, tmp_path))
    blue = [(abs(one - (0.122, 0.467, 0.706)) < 0.02).all(axis=-1).sum() for one in pixels]
    assert blue[0] < blue[1] / 3


def test_what_the_growth_rule_logs_is_drawn_by_name(tmp_path):
    steps = {"growth_metrics": ["path_slope", "tensors_raised", "not_logged"]}
    logs = [{**entry, "tensors_raised": number} for number, entry in enumerate(ALSALS_LOGS)]
    page = Page(report(write_run(tmp_path / "run", logs, StepSizeCallback=steps)))
    curves = ["loss", "step size", "Armijo ratio, cut off at -1 and 2", "probes per step"]
    assert list(page.images) == [*curves, "path slope", "tensors raised"]
    rising, flat = page.pixels("tensors raised", tmp_path), page.pixels("path slope", tmp_path)
    assert has_color(rising, "#1f77b4") and has_color(flat, "#1f77b4") and (rising != flat).any()
    assert list(Page(report(write_run(tmp_path / "other", logs))).images) == curves


@pytest.mark.parametrize(("growth", "drawn"), [("path", ["path slope"]), ("constant", [])])
def test_a_run_says_what_its_growth_rule_logs(growth, drawn, tmp_path):
    args = arguments(tmp_path, max_steps=3, optim_args=f"growth={growth},search_interval=1")
    AlsalsTrainer(gpt2(), args, train_dataset=Sequences()).train()
    images = list(Page(report(str(tmp_path))).images)
    assert images[images.index("probes per step") + 1 :] == drawn
    assert ("step sizes of tensors: median and quartiles" in images) == (growth == "path")


def test_the_newest_of_the_states_is_taken(tmp_path):
    write_run(tmp_path / "checkpoint-20", ALSALS_LOGS[:2], step=20)
    assert load_run(str(tmp_path)).state.global_step == 20
    run = write_run(tmp_path, ALSALS_LOGS[:1], step=10)
    os.utime(tmp_path / "trainer_state.json", (1e9, 1e9))
    (tmp_path / "checkpoint-30").mkdir()
    (tmp_path / "checkpoint-30" / "trainer_state.json").write_text('{"global_step": 30, "log_hist')
    page = report(run)
    modified = datetime.datetime.fromtimestamp((tmp_path / "checkpoint-20" / "trainer_state.json").stat().st_mtime)
    updated = modified.astimezone().isoformat(timespec="seconds")
    assert f"running or stopped at step 20 of 40, last update {updated}" in Page(page).texts
    assert Page(page).cells()["training loss, last"] == "0.15"


def test_the_states_of_an_earlier_run_are_older(tmp_path):
    for step, hour in ((20, "07"), (30, "07"), (10, "08")):
        folder = tmp_path if step == 10 else tmp_path / f"checkpoint-{step}"
        steps = {"updated": f"2024-05-06T{hour}:00:00+00:00"}
        write_run(folder, ALSALS_LOGS[:1], step=step, StepSizeCallback=steps)
    assert load_run(str(tmp_path)).state.global_step == 10
    # A checkpoint has the time of the last update before it.
    write_run(tmp_path / "checkpoint-15", ALSALS_LOGS[:1], step=15, StepSizeCallback=steps)
    assert load_run(str(tmp_path)).state.global_step == 15


def test_the_time_of_a_resumed_run_is_that_of_the_steps_since(tmp_path):
    run = load_run(write_run(tmp_path, [*ALSALS_LOGS, END_LOG], StepSizeCallback={"first_step": 24}))
    assert run.seconds_per_step == 0.5
    assert run.summary()["steps per second"] == "2"


def test_a_metric_that_is_no_number_is_left_out(tmp_path):
    evaluation = {"step": 20, "eval_loss": 0.5, "eval_confusion": [[1, 2], [3, 4]], "eval_classes": {"a": 1}}
    assert load_run(write_run(tmp_path, [*ADAMW_LOGS, evaluation])).metrics == {"eval_loss": [(20, 0.5)]}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0])
def test_values_that_no_curve_can_show(value, tmp_path):
    logs = [{name: item if name == "step" else value for name, item in entry.items()} for entry in ALSALS_LOGS]
    steps = {"growth_metrics": ["path_slope"]}
    page = Page(report(write_run(tmp_path, [*logs, {"step": 40, "eval_loss": value}], StepSizeCallback=steps)))
    assert page.cells()["training loss, last"] == f"{value:.4g}"
    assert page.cells()["eval_loss, lowest"] == f"{value:.4g} (step 40)"
    assert len(page.images) == 5


def test_the_best_evaluation_is_one_that_is_finite(tmp_path):
    evaluations = [{"step": step, "eval_loss": loss} for step, loss in ((10, math.nan), (20, 0.5), (40, math.inf))]
    cells = Page(report(write_run(tmp_path, evaluations))).cells()
    assert (cells["eval_loss, lowest"], cells["eval_loss, last"]) == ("0.5 (step 20)", "inf")


def test_a_run_without_any_log(tmp_path):
    page = Page(report(write_run(tmp_path, [], step=0)))
    assert page.images == {}
    assert page.cells() == {"optimizer": "not recorded", "optimizer steps": "0"}


def test_an_evaluation_after_training_is_taken_from_the_results(tmp_path):
    run = write_run(tmp_path, [*ADAMW_LOGS, *EVAL_LOGS, END_LOG])
    results = {"eval_loss": 0.125, "eval_accuracy": 0.25, "eval_samples": 7, "train_loss": 1.0}
    (tmp_path / "all_results.json").write_text(json.dumps(results))
    metrics = load_run(run).metrics
    assert metrics == {
        "eval_loss": [(20, 0.25), (40, 0.375), (40, 0.125)],
        "eval_accuracy": [(20, 0.5), (40, 0.25)],
    }
    # They are those of an earlier training while this one goes on.
    assert len(load_run(write_run(tmp_path, [*ADAMW_LOGS, *EVAL_LOGS])).metrics["eval_loss"]) == 2


def test_line_profiles_are_shown_in_their_order(tmp_path):
    callback = LineProfileCallback(2)
    trainer = AlsalsTrainer(gpt2(), arguments(tmp_path, max_steps=4), train_dataset=Sequences(), callbacks=[callback])
    trainer.train()
    page = Page(report(str(tmp_path)))
    names = [name for name in page.images if name.startswith("step-")]
    assert names == ["step-000002", "step-000004"]
    for name in names:
        assert (page.pixels(name, tmp_path) == imread(tmp_path / "line_profile" / f"{name}.png")[..., :3]).all()


def test_a_profile_that_lies_elsewhere_is_not_shown(tmp_path, caplog):
    run = write_run(tmp_path / "run", ADAMW_LOGS)
    (tmp_path / "run" / "line_profile").mkdir()
    (tmp_path / "private").write_text("secret")
    for number, target in enumerate([tmp_path / "private", tmp_path / "nowhere"]):
        (tmp_path / "run" / "line_profile" / f"step-{number}.png").symlink_to(target)
    page = report(run)
    assert base64.b64encode(b"secret").decode() not in page
    assert "Loss along the search direction" not in page
    assert sum("is a link, or lies behind one" in message for message in caplog.messages) == 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "step-1.png").write_text("secret")
    elsewhere = write_run(tmp_path / "elsewhere", ADAMW_LOGS)
    (tmp_path / "elsewhere" / "line_profile").symlink_to(tmp_path / "other")
    assert "Loss along the search direction" not in report(elsewhere)


def test_a_run_and_a_metric_of_any_name_are_drawn(tmp_path):
    evaluations = [{"step": 20, "eval_$x_$loss": 0.5}, {"step": 40, "eval_$x_$loss": 0.25}]
    run = write_run(tmp_path / "run_$a_$b", [*ADAMW_LOGS, *evaluations])
    assert "$x_$loss" in report(run)
    assert "run_$a_$b" in compare([run, run])


@pytest.mark.parametrize("content", ["", "{", "[1]", "null"])
def test_results_that_cannot_be_read_are_named(content, tmp_path):
    run = write_run(tmp_path, [*ADAMW_LOGS, END_LOG])
    (tmp_path / "all_results.json").write_text(content)
    with pytest.raises(ValueError, match=r"^all_results\.json in run_dir must hold names and values, that of "):
        report(run)


def test_a_page_asks_for_nothing_and_tells_no_path(tmp_path):
    steps = {"settings": {"optim": "alsals", "output_dir": str(tmp_path / "run"), "run_name": "<i>x</i>"}}
    failures = {"warnings": [{"step": 3, "message": "a <b>bold</b> word"}]}
    logs = [*ALSALS_LOGS, *EVAL_LOGS, END_LOG]
    run = write_run(tmp_path / "run", logs, StepSizeCallback=steps, FailureCallback=failures)
    other = write_run(tmp_path / "<u>other</u>", logs)
    for page in (report(run), compare([run, other])):
        assert "://" not in page
        sources = re.findall(r"(?:src|href|url)\s*[=(]\s*(.{5})", page)
        assert set(sources) == {'"data'}
        assert str(tmp_path) not in page
        for tag in ("<b>bold", "<i>", "<u>", "<script"):
            assert tag not in page
    texts = Page(report(run)).texts
    assert "Step 3: a <b>bold</b> word" in texts
    assert texts.index("Warnings") < texts.index("Summary")


def test_runs_are_compared(tmp_path):
    steps = {"settings": {"optim": "alsals", "seed": 1, "bf16": True}}
    warning = {"warnings": [{"step": 3, "message": "a word"}]}
    one = write_run(tmp_path / "one", [*ALSALS_LOGS, END_LOG], StepSizeCallback=steps, FailureCallback=warning)
    two = write_run(tmp_path / "two", ADAMW_LOGS, max_steps=50)
    steps = {"settings": {"optim": "alsals", "bf16": True}}
    three = write_run(tmp_path / "three", [*ALSALS_LOGS, *EVAL_LOGS], StepSizeCallback=steps)
    page = Page(compare([one, two, three]))
    header, *rows = page.rows
    table = {row[0]: dict(zip(header, row, strict=True)) for row in rows[:3]}
    assert [table[name]["state"] for name in table] == ["finished", "running or stopped at step 40 of 50", "finished"]
    assert [table[name]["warnings"] for name in table] == ["1", "0", "0"]
    assert [table[name]["eval_loss, last"] for name in table] == ["", "", "0.375"]
    assert rows[3:] == [
        ["setting", "one", "two", "three"],
        ["bf16", "True", "not recorded", "True"],
        ["optim", "alsals", "not recorded", "alsals"],
        ["seed", "1", "not recorded", "default"],
    ]
    assert [row[0] for row in Page(compare([one, three])).rows[4:]] == ["seed"]


def test_only_runs_that_have_ended_are_drawn_against_seconds(tmp_path):
    runs = [write_run(tmp_path / "one", [*ADAMW_LOGS, END_LOG]), write_run(tmp_path / "two", ADAMW_LOGS[1:])]
    assert compare(runs).count("<figcaption>training loss</figcaption>") == 2
    against_steps, against_seconds = compare(runs).split("Curves against seconds")
    blue, orange = "#1f77b4", "#ff7f0e"
    shown = [
        [has_color(Page(page).pixels("step size taken", tmp_path), color) for color in (blue, orange)]
        for page in (against_steps, against_seconds)
    ]
    assert shown == [[True, True], [True, False]]
    assert "Curves against seconds" not in compare([runs[1], write_run(tmp_path / "three", ADAMW_LOGS)])


ODD = [None, "yesterday", [None], 0]
PLACES = [*ALSALS_LOGS[0], "entry", "log_history", "stateful_callbacks", "attributes", "train_runtime", "eval_loss"]
PLACES += ["updated", "settings", "c", "growth_metrics", "first_step", "search_seconds", "warnings", "max_steps"]


@pytest.mark.parametrize("odd", ODD, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_odd_content_is_left_out_or_named(place, odd, tmp_path, monkeypatch):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **kwargs: None)  # hundreds of pictures
    own = {"updated": "2024-05-06T07:08:09+00:00", "settings": {"optim": "alsals"}, "search_seconds": 1.0, "c": 0.3}
    folder = write_run(
        tmp_path / "run", [*ALSALS_LOGS, *EVAL_LOGS, END_LOG], StepSizeCallback=own, FailureCallback={"warnings": []}
    )
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    callbacks = state["stateful_callbacks"]
    if place in state:
        state[place] = odd
    elif place == "entry":
        state["log_history"].insert(1, odd)
    elif place in ("train_runtime", "eval_loss"):
        state["log_history"][-1 if place == "train_runtime" else -2][place] = odd
    elif place in ALSALS_LOGS[0]:
        state["log_history"][0][place] = odd
    elif place == "attributes":
        callbacks["StepSizeCallback"]["attributes"] = odd
    else:
        callbacks["FailureCallback" if place == "warnings" else "StepSizeCallback"]["attributes"][place] = odd
    (tmp_path / "run" / "trainer_state.json").write_text(json.dumps(state))
    for page in (lambda: report(folder), lambda: compare([folder, folder])):
        try:
            assert "</html>" in page()
        except ValueError as error:
            assert place in ("max_steps", "stateful_callbacks")
            assert str(error).startswith("run_dir must be ") and repr(folder) in str(error)


@pytest.mark.parametrize("count", [2, 10, 11, 30])
def test_runs_of_the_same_name_can_be_told_apart(count, tmp_path):
    runs = [write_run(tmp_path / str(number) / "digits", ADAMW_LOGS) for number in range(count)]
    page = compare(runs)
    assert [row[0] for row in Page(page).rows[1 : count + 1]] == [f"{i}: digits" for i in range(1, count + 1)]
    assert len(set(re.findall("color: (#[0-9a-f]{6})", page.split("</style>")[1]))) == count


@pytest.mark.parametrize("content", [None, "", "[]", '{"unknown": 1}'])
def test_a_folder_without_a_run_is_named(content, tmp_path):
    if content is not None:
        (tmp_path / "trainer_state.json").write_text(content)
    with pytest.raises(ValueError, match=f"run_dir must be a folder with a trainer_state.json .*{tmp_path}"):
        report(str(tmp_path))


@pytest.fixture
def browser(tmp_path):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    for flag in f"{flags} disable-component-update disable-sync user-data-dir={tmp_path / 'browser'}".split():
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.mark.skipif(
    shutil.which("chromium") is None or shutil.which("chromedriver") is None,
    reason="needs Debian's packages chromium and chromium-driver",
)
def test_the_pages_of_a_real_run_in_a_real_browser(browser, tmp_path):
    args = arguments(tmp_path / "run", max_steps=12, eval_strategy="steps", eval_steps=4)
    trainer = AlsalsTrainer(gpt2(), args, train_dataset=Sequences(), eval_dataset=Sequences(7))
    trainer.train()
    message = "planted: a <b>bold</b> & long word"
    failures = {"attributes": {"warnings": [{"step": 3, "message": message}]}}
    trainer.state.stateful_callbacks["FailureCallback"] = failures
    trainer.save_state()
    pages = {"report": report(args.output_dir), "compare": compare([args.output_dir, args.output_dir])}
    shown = {}
    for name, page in pages.items():
        (tmp_path / f"{name}.html").write_text(page, encoding="utf-8")
        for width in (400, 1400):
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            browser.get((tmp_path / f"{name}.html").as_uri())
            assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
        shown[name] = browser.execute_script(
            "return {title: document.title, text: document.body.innerText,"
            " images: [...document.images].map(image => [image.alt, image.complete && image.naturalWidth]),"
            " bold: document.querySelectorAll('.warnings b').length,"
            " rows: [...document.querySelectorAll('tr')].map(row => [...row.cells].map(cell => cell.innerText))}"
        )
    assert browser.get_log("browser") == []

    one = shown["report"]
    assert one["title"] == "Run run"
    by_kind = "step sizes of tensors: median and quartiles"
    curves = ["loss", "step size", by_kind, "Armijo ratio, cut off at -1 and 2", "probes per step", "path slope"]
    assert [alt for alt, _ in one["images"]] == curves
    assert min(width for page in shown.values() for _, width in page["images"]) > 500
    assert f"Step 3: {message}" in one["text"]
    assert one["bold"] == 0

    logs = [entry for entry in trainer.state.log_history if "step_size" in entry]
    evaluations = {entry["eval_loss"]: entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry}
    lowest, (*_, last) = min(evaluations), evaluations
    assert (len(logs), len(evaluations)) == (12, 3)
    expected = {
        "optimizer": "alsals",
        "optimizer steps": "12",
        "training loss, last": f"{logs[-1]['loss']:.4g}",
        "eval_loss, lowest": f"{lowest:.4g} (step {evaluations[lowest]})",
        "eval_loss, last": f"{last:.4g}",
        "step size of the search, last": f"{logs[-1]['step_size']:.4g}",
        "step size taken, last": f"{logs[-1]['learning_rate']:.4g}",
        "probes per step": f"{trainer.alsals.search.total_probes / 12:.2f}",
        "steps per second": f"{12 / trainer.state.log_history[-1]['train_runtime']:.4g}",
        "max_steps": "12",
        "output_dir": "run",
    }
    rows = dict(one["rows"])
    assert {name: rows[name] for name in expected} == expected
    share = float(rows["time in the search"].removesuffix("%"))
    assert share == pytest.approx(
        100 * trainer.alsals.search_seconds / trainer.state.log_history[-1]["train_runtime"], abs=0.06
    )

    two = shown["compare"]
    assert two["title"] == "Comparison of 2 runs"
    header, *lines = two["rows"]
    assert [line[0] for line in lines] == ["1: run", "2: run"]
    for line in lines:
        cells = dict(zip(header, line, strict=True))
        assert {name: cells[name] for name in expected if name in cells} == {
            name: expected[name] for name in list(expected)[:9]
        }
