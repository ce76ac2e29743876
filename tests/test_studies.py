import importlib.util
import json
import math
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

from hf_alsals import ALSALS

STUDIES = Path(__file__).parent.parent / "recipes" / "studies"


def load(name):
    spec = importlib.util.spec_from_file_location(name, STUDIES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


study = load("study")  # the others import it
slope, batch_noise, irregular_landscape = load("slope"), load("batch_noise"), load("irregular_landscape")
directions, surrogate, path_sample = load("directions"), load("surrogate"), load("path_sample")
grid_slopes = load("grid_slopes")


def run(module, monkeypatch, folder, *flags):
    monkeypatch.setattr(sys, "argv", ["study.py", "--output_dir", str(folder), *flags])
    module.main()
    return json.loads(folder.joinpath(f"{module.__name__}.json").read_text())


STUDIED = (slope, batch_noise, irregular_landscape, directions, surrogate, grid_slopes)


@pytest.mark.parametrize("module", STUDIED, ids=lambda module: module.__name__)
def test_a_page_holds_the_table_of_its_numbers(module):
    report = json.loads(STUDIES.joinpath(f"{module.__name__}.json").read_text())
    page = STUDIES.joinpath(f"{module.__name__}.md").read_text()
    for table in module.table(report).split("\n\n"):
        assert table in page
    measured = report.get("runs", report.get("points"))
    for row, again in zip(report["rows"], module.summarize(measured), strict=True):
        assert again == pytest.approx(row)
    assert report["command"] == f"python recipes/studies/{module.__name__}.py"
    assert f"]({module.__name__}.png)" in page and STUDIES.joinpath(f"{module.__name__}.png").exists()


def test_slopes_are_those_of_the_loss(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(slope, "LENGTH", 32)  # bfloat16 is slow on most CPUs
    flags = ("--steps", "5", "--every", "2", "--seed", "3")
    report = run(slope, monkeypatch, tmp_path, *flags)
    assert capsys.readouterr().out.strip() == slope.table(report)
    assert tmp_path.joinpath("slope.png").stat().st_size > 10_000
    assert [point["step"] for point in report["points"]] == [0, 2, 4]
    first = report["points"][0]
    assert first["searched_slope"] == pytest.approx(first["float32"]["exact"], rel=1e-5)
    # The first direction of Adam is the sign of the gradient, where that is far above eps.
    assert first["float32"]["preconditioned"] == pytest.approx(first["float32"]["exact"], rel=1e-3)
    assert first["smoothed"] == pytest.approx(0.01 * first["float32"]["exact"], rel=1e-5)
    for point in report["points"]:
        double, single = point["float64"], point["float32"]
        assert double["exact"] == pytest.approx(double["true"], rel=1e-6)
        assert double["finite_difference"]["1e-09"] == pytest.approx(double["true"], rel=1e-4)
        assert single["exact"] == pytest.approx(double["true"], rel=1e-4)
        for precision in ("bfloat16 autocast", "bfloat16 weights"):
            assert point[precision]["exact"] == pytest.approx(point[precision]["true"], rel=1e-2)
    rows = {(row["estimate"], row["precision"]): row for row in report["rows"]}
    assert rows["exact", "float64"]["correlation"] == pytest.approx(1)
    assert rows["smoothed", "float32"]["bias"] < -0.5  # an average that starts at 0


def test_a_share_of_labels_is_replaced_by_others():
    _, labels, _, _ = study.digits()
    assert torch.equal(batch_noise.replace_labels(labels, 0.0, 1), labels)
    replaced = batch_noise.replace_labels(labels, 0.4, 1)
    assert (replaced != labels).sum() == round(0.4 * len(labels))
    assert set(replaced.tolist()) == set(range(10))
    assert not torch.equal(replaced, batch_noise.replace_labels(labels, 0.4, 2))


def test_batch_noise_runs_every_setting(monkeypatch, tmp_path, capsys):
    report = run(batch_noise, monkeypatch, tmp_path, "--steps", "8", "--seeds", "1", "2")
    table = batch_noise.table(report)
    assert capsys.readouterr().out.strip() == table
    assert len(table.splitlines()) == 2 + len(batch_noise.SHARES) * len(batch_noise.BATCH_SIZES)
    assert len(report["runs"]) == 2 * 20 * (1 + len(study.LEARNING_RATES))
    assert tmp_path.joinpath("batch_noise.png").stat().st_size > 10_000


def plain_alsals(steps):
    """The same training as that of the studies, on 64 rows a batch, written out."""
    x, y, x_validation, y_validation = study.digits()
    torch.manual_seed(5)
    sizes = (64, 128, 128, 10)
    layers = [layer for pair in pairwise(sizes) for layer in (torch.nn.Linear(*pair), torch.nn.ReLU())]
    model = torch.nn.Sequential(*layers[:-1])
    optimizer = ALSALS(model.parameters())
    generator = torch.Generator().manual_seed(5)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1 - step / steps
        rows = torch.randperm(len(x), generator=generator)[:64]
        loss = cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(lambda rows=rows: cross_entropy(model(x[rows]), y[rows]), loss)
    with torch.no_grad():
        return cross_entropy(model(x_validation), y_validation).item()


def test_without_noise_and_roughness_it_is_the_plain_run():
    expected = plain_alsals(30)
    clean = batch_noise.run(batch_size=64, share=0.0, learning_rate=None, seed=5, steps=30)
    assert clean["validation_loss"] == expected
    flat = irregular_landscape.run(0.0, 300, "alsals", None, seed=5, steps=30)
    assert (flat["validation_loss"], flat["roughness"]) == (expected, 0.0)
    rough = irregular_landscape.run(0.1, 300, "alsals", None, seed=5, steps=30)
    assert rough["validation_loss"] != expected and 0 < rough["roughness"] <= 0.2


def test_roughness_is_the_formula():
    model = torch.nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 0.1]]))
        model.bias.fill_(-0.2)
    expected = 3 * (2 - math.cos(0.7) - math.cos(1.4)) / 3
    assert irregular_landscape.roughness(model, 3.0, 7.0).item() == pytest.approx(expected)


def test_numbers_of_searches():
    sizes, ratios = [0.1, 1.0, 1.0, 2.0, 1.0], [9.0, 0.2, math.nan, 0.6, 0.4]
    records = [
        {"step_size": size, "probes": i % 2 * 4, "searched": i % 2 == 1, "ratio": ratio}
        for size, ratio in zip(sizes, ratios)
        for i in range(2)
    ]
    numbers = irregular_landscape.search_numbers(records)
    assert numbers["probes"] == 2 and numbers["probes_a_search"] == 4
    assert numbers["ratio"] == pytest.approx(0.4)
    assert numbers["jump"] == pytest.approx(2 * math.log(2) / 3)
    assert (numbers["first_step_size"], numbers["step_size"]) == (0.1, 1.0)
    path_slopes = [record | {"path_slope": float(i)} for i, record in enumerate(records)]
    assert irregular_landscape.search_numbers(path_slopes)["path_slope"] == 2


def test_irregular_landscape_runs_every_setting(monkeypatch, tmp_path, capsys):
    report = run(irregular_landscape, monkeypatch, tmp_path, "--steps", "12", "--seeds", "1")
    table = irregular_landscape.table(report)
    assert capsys.readouterr().out.strip() == table
    assert len(table.splitlines()) == 2 + 3 * len(irregular_landscape.LANDSCAPES)
    assert len(report["runs"]) == (2 + len(study.LEARNING_RATES)) * len(irregular_landscape.LANDSCAPES)
    assert tmp_path.joinpath("irregular_landscape.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", directions.OPTIMIZERS)
def test_a_step_is_proportional_to_the_learning_rate(name):
    make, _ = directions.OPTIMIZERS[name]
    moves = []
    for rate in (1.0, 0.5):
        model = study.network(2).double()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = make(model.parameters(), lr=rate)
        model(torch.ones(1, 64).double()).square().sum().backward()
        optimizer.step()
        moves.append([(start - p.detach()) / rate for start, p in zip(before, model.parameters(), strict=True)])
    for one, other in zip(*moves, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        assert one.abs().max() > 0


def test_directions_runs_every_setting(monkeypatch, tmp_path, capsys):
    report = run(directions, monkeypatch, tmp_path, "--steps", "4", "--seeds", "1")
    table = directions.table(report)
    assert capsys.readouterr().out.strip() == table
    assert len(table.splitlines()) == 2 + len(directions.OPTIMIZERS)
    assert len(report["runs"]) == sum(1 + len(rates) for _, rates in directions.OPTIMIZERS.values())
    assert tmp_path.joinpath("directions.png").stat().st_size > 10_000


def test_surrogate_runs_every_setting(monkeypatch, tmp_path, capsys):
    reason = "TRL is optional: its newest release may not run on the oldest transformers"
    pytest.importorskip("trl.trainer.grpo_trainer", reason=reason)
    monkeypatch.setattr(surrogate, "LEARNING_RATES", (1e-3,))
    report = run(surrogate, monkeypatch, tmp_path, "--steps", "5", "--seeds", "1")
    table = surrogate.table(report)
    assert capsys.readouterr().out.strip().endswith(table)
    assert len(report["runs"]) == 2 * len(surrogate.SETTINGS)
    assert tmp_path.joinpath("surrogate.png").stat().st_size > 10_000
    blind = {one["setting"]: one["is_blind"] for one in report["runs"] if one["learning_rate"] is None}
    assert blind["GRPO"] and not blind["RLOO"]


def test_the_reward_counts_words_in_order():
    assert surrogate.count_of_pairs([[5, 6, 7, 9], [5], [9, 8]]) == [2.0, 0.0, 0.0]
    assert surrogate.sequences((1, 3), 3)[:2] == [[0, 1, 2], [0, 3, 6]]


def test_a_sample_of_all_elements_is_the_whole_and_a_smaller_one_near_it(monkeypatch, tmp_path):
    monkeypatch.setattr(path_sample, "MODELS", {"GPT-2, width 128": path_sample.MODELS["GPT-2, width 128"]})
    report = run(
        path_sample, monkeypatch, tmp_path, "--steps", "8", "--batch_size", "2", "--sizes", "2000000", "131072"
    )
    (one,) = report["runs"]
    whole, sampled = one["slopes"]["2000000"], one["slopes"]["131072"]
    assert whole == pytest.approx(one["slopes"]["all"], rel=1e-4)
    assert sampled != whole
    assert one["rows"][1]["noise"] < 1
    assert tmp_path.joinpath("path_sample.png").stat().st_size > 10_000


def test_the_page_on_the_sample_holds_the_table_of_its_numbers():
    report = json.loads(STUDIES.joinpath("path_sample.json").read_text())
    page = STUDIES.joinpath("path_sample.md").read_text()
    assert path_sample.table(report) in page
    assert "](path_sample.png)" in page and STUDIES.joinpath("path_sample.png").exists()
    followed = report["steps"] // 2
    for one in report["runs"]:
        for row in one["rows"]:
            sampled, all_of_it = (one["slopes"][name][:followed] for name in (str(row["size"]), "all"))
            assert path_sample.row_of(row["size"], sampled, all_of_it) == pytest.approx(row)


def test_slopes_of_the_grid_are_those_of_the_definition():
    """Ten steps of AdamW, whose weights and gradients are all kept and looked at afterwards."""
    torch.manual_seed(1)
    embedding, layer = torch.nn.Embedding(8, 4), torch.nn.Linear(4, 3)
    model = torch.nn.Sequential(embedding, layer).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    recorder, state, control = grid_slopes.SlopeRecorder(), SimpleNamespace(max_steps=20), SimpleNamespace()
    control.should_training_stop = False
    recorder.on_train_begin(None, state, control, model=model, optimizer=optimizer)
    kinds = {"others": embedding.weight, "hidden": layer.weight, "vectors": layer.bias}
    weights, gradients = {kind: [] for kind in kinds}, {kind: [] for kind in kinds}
    for step in range(10):
        rows, targets = torch.randint(8, (5,)), torch.randint(3, (5,))
        optimizer.zero_grad()
        cross_entropy(model(rows), targets).backward()
        for kind, p in kinds.items():
            weights[kind].append(p.detach().clone())
            gradients[kind].append(p.grad.clone())
        optimizer.step()
        state.global_step = step
        recorder.on_optimizer_step(None, state, control, optimizer=optimizer)
        state.global_step = step + 1
        assert not control.should_training_stop
        recorder.on_step_end(None, state, control)
    assert control.should_training_stop
    for kind, p in kinds.items():
        w, g, sums = [*weights[kind], p.detach()], gradients[kind], recorder.sums[kind]
        for k in range(10):
            path = (g[k] * (w[0] - w[k])).sum().item()
            settled = path - 3 * (g[k] * (w[max(k - 1, 0)] - w[k])).sum().item()
            v = sum(0.001 * 0.999 ** (k - i) * g[i] ** 2 for i in range(k + 1)) / (1 - 0.999 ** (k + 1))
            expected = {
                "path": path,
                "path_size": abs(path),
                "settled": settled,
                "settled_size": abs(settled),
                "gradient": 0.1 * (g[k] ** 2 / (v.sqrt() + 1e-8)).sum().item(),
                "predicted": (g[k] * (w[k] - w[k + 1])).sum().item(),
            }
            assert {name: values[k] for name, values in sums.items()} == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_half_of_a_recipe_is_recorded(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(STUDIES)  # where the other process finds it
    flags = {"optim": "adamw_torch", "max_steps": "20", "do_train": "true", "output_dir": str(tmp_path / "out")}
    argv = [str(STUDIES.parent / "run_image_classification.py")]
    argv += [part for name, value in flags.items() for part in (f"--{name}", value)]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        sums = pool.submit(grid_slopes.record, argv).result()
    assert json.loads(tmp_path.joinpath("out/trainer_state.json").read_text())["global_step"] == 10
    for kind in grid_slopes.KINDS:
        assert [len(values) for values in sums[kind].values()] == [10] * 6
        assert all(value > 0 for value in sums[kind]["gradient"])
    one = {"task": "digits", "learning_rate": 0.003, "loss": 1.0, "sums": sums}
    (row,) = grid_slopes.summarize([one])
    assert sum(row[f"late_{kind}_share"] for kind in grid_slopes.KINDS) == pytest.approx(1)


def test_a_rate_that_the_sweep_lacks_is_refused_before_training(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=r"digits has no run at 0\.5, which .*compare\.py --tasks digits"):
        run(grid_slopes, monkeypatch, tmp_path, "--tasks", "digits", "--learning_rates", "0.5")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "expected"),
    [((1.0, 0.0, -0.6), f"{10**0.5:.2g}"), ((-0.4, -0.5, -0.6), "below 0.1"), ((1.0, 0.5, 0.0), "above 10")],
)
def test_a_crossing_is_between_rates_by_their_logarithms(values, expected):
    rows = [
        {"learning_rate": rate, "is_best": rate == 1e-2, "late_hidden_r": value}
        for rate, value in zip((1e-3, 1e-2, 1e-1), values, strict=True)
    ]
    assert grid_slopes.crossing(rows, grid_slopes.STATISTICS["r"]) == expected
