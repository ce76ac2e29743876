from dataclasses import dataclass, fields

import pytest
import torch
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_alsals import (
    ALSALS,
    LINE_SEARCHES,
    PRESETS,
    AlsalsArgumentsMixin,
    AlsalsSeq2SeqTrainingArguments,
    AlsalsTrainer,
    AlsalsTrainingArguments,
)
from hf_alsals.presets import line_search_of

# A value of each option that is no preset's.
VALUES = {
    "c": 0.42,
    "beta3": 0.37,
    "growth_factor": 1.07,
    "decrease_factor": 0.61,
    "initial_step_size": 0.023,
    "search_interval": 4,
}


def from_command_line(*flags, cls=AlsalsTrainingArguments):
    (args,) = HfArgumentParser(cls).parse_args_into_dataclasses([*flags])
    return args


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("cls", [AlsalsTrainingArguments, AlsalsSeq2SeqTrainingArguments])
def test_presets_are_accepted_from_python_and_from_the_command_line(preset, cls, tmp_path):
    for args in (
        cls(output_dir=str(tmp_path), optim=preset),
        from_command_line("--output_dir", str(tmp_path), "--optim", preset, cls=cls),
    ):
        assert args.optim == preset
        assert args.learning_rate == 1.0
        assert args.lr_scheduler_type == ("warmup_stable_decay" if preset in ("alsals", "alsals_muon") else "constant")
        assert args.to_dict()["optim"] == preset


def test_explicit_values_win_over_the_defaults_of_a_preset():
    args = from_command_line(
        "--optim", "adam_sls", "--learning_rate", "0.5", "--lr_scheduler_type", "linear", "--adam_beta1", "0.8"
    )
    assert (args.learning_rate, args.lr_scheduler_type, args.adam_beta1) == (0.5, "linear", 0.8)


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", OptimizerNames.SGD, None])
@pytest.mark.parametrize(
    ("ours", "plain"),
    [
        (AlsalsTrainingArguments, TrainingArguments),
        (AlsalsSeq2SeqTrainingArguments, Seq2SeqTrainingArguments),
    ],
)
def test_other_optimizers_have_every_value_of_the_plain_arguments(optim, ours, plain, tmp_path):
    chosen = {} if optim is None else {"optim": optim}
    args = ours(str(tmp_path), **chosen)
    expected = plain(str(tmp_path), **chosen)
    for field in fields(plain):
        if field.init:
            assert getattr(args, field.name) == getattr(expected, field.name), field.name


def test_the_mixin_takes_the_defaults_of_the_class_it_extends(tmp_path):
    @dataclass
    class TheirArguments(TrainingArguments):
        learning_rate: float = 2e-5

    @dataclass
    class OurArguments(AlsalsArgumentsMixin, TheirArguments):
        pass

    assert OurArguments(str(tmp_path), optim="adamw_torch").learning_rate == 2e-5
    assert OurArguments(str(tmp_path), optim="alsals").learning_rate == 1.0


def test_optim_args_and_adam_arguments_reach_the_optimizer(tmp_path):
    args = AlsalsTrainingArguments(
        str(tmp_path),
        optim="salsa",
        optim_args="c=0.4, growth_factor=1.02,search_interval=7,slope=exact",
        adam_beta2=0.95,
        adam_epsilon=1e-6,
    )
    assert args.alsals_kwargs() == {
        "growth": "constant",
        "c": 0.4,
        "growth_factor": 1.02,
        "decrease_factor": 0.8,
        "slope": "exact",
        "search_interval": 7,
        "lr": 1.0,
        "betas": (0.9, 0.95),
        "eps": 1e-6,
    }


def optimizer_of(args):
    optimizer_cls, kwargs = AlsalsTrainer.get_optimizer_cls_and_kwargs(args)
    return optimizer_cls([torch.nn.Parameter(torch.ones(3))], **kwargs)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_option_of_every_preset_reaches_the_optimizer(preset, tmp_path):
    defaults = optimizer_of(AlsalsTrainingArguments(str(tmp_path), optim=preset)).line_search.options
    assert defaults == ALSALS([torch.nn.Parameter(torch.ones(3))], **PRESETS[preset]).line_search.options
    for name, value in VALUES.items():
        args = AlsalsTrainingArguments(str(tmp_path), optim=preset, optim_args=f"{name}={value}")
        options = optimizer_of(args).line_search.options
        assert options == defaults | {name: value} and options != defaults
        assert type(options[name]) is type(value)
    together = ",".join(f"{name}={value}" for name, value in VALUES.items())
    args = AlsalsTrainingArguments(str(tmp_path), optim=preset, optim_args=together)
    assert optimizer_of(args).line_search.options == VALUES


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("growth", LINE_SEARCHES)
def test_growth_and_slope_reach_the_optimizer(preset, growth, tmp_path):
    optim_args = f"growth={growth},slope=finite_difference,search_interval=adaptive"
    optimizer = optimizer_of(AlsalsTrainingArguments(str(tmp_path), optim=preset, optim_args=optim_args))
    assert optimizer.line_search.growth.name == growth
    assert optimizer.slope_method == "finite_difference"
    assert optimizer.line_search.options["search_interval"] == "adaptive"


def test_adam_sls_has_no_momentum_unless_asked_for(tmp_path):
    assert AlsalsTrainingArguments(str(tmp_path), optim="adam_sls").alsals_kwargs()["betas"] == (0.0, 0.999)


@pytest.mark.parametrize(
    ("optim_args", "message"),
    [
        ("probe_micro_batches=0", "probe_micro_batches must be an int of at least 1, got 0"),
        ("probe_micro_batches=2.0", "probe_micro_batches must be an int of at least 1, got 2.0"),
        ("probe_micro_batches=half", "probe_micro_batches must be an int of at least 1, got 'half'"),
        ("c=high", r"c must be a number in \(0, 1\), got 'high'"),
        ("c=1.5", r"c must be a number in \(0, 1\), got 1.5"),
        ("c=nan", r"c must be a number in \(0, 1\), got nan"),
        ("beta3=1", r"beta3 must be a number in \[0, 1\), got 1"),
        ("growth_factor=0.9", "growth_factor must be a finite number of at least 1, got 0.9"),
        ("decrease_factor=0", r"decrease_factor must be a number in \(0, 1\), got 0"),
        ("initial_step_size=inf", "initial_step_size must be a positive finite number, got inf"),
        ("search_interval=often", 'search_interval must be at least 1, "adaptive" or "never", got \'often\''),
        ("search_interval=1.5", 'search_interval must be an int, "adaptive" or "never", got 1.5'),
        ("search_interval=0", "search_interval must be at least 1"),
        ("growth=fast", "growth must be one of path, constant, got 'fast'"),
        ("slope=steep", "slope must be one of exact, preconditioned, finite_difference, got 'steep'"),
        ("lr=0.5", "unknown key 'lr'"),
        ("c=0.5, c=0.7", "must have every name once, got c twice in 'c=0.5, c=0.7'"),
        ("c:0.5", "must look like \"c=0.5,growth_factor=1.02\", got 'c:0.5'"),
    ],
)
def test_a_bad_optim_arg_is_named_before_training(optim_args, message, tmp_path):
    with pytest.raises(ValueError, match=f"^optim_args.* {message}"):
        AlsalsTrainingArguments(str(tmp_path), optim="alsals", optim_args=optim_args)


@pytest.mark.parametrize("preset", PRESETS)
def test_an_unknown_option_is_named_with_all_that_there_are(preset, tmp_path):
    options = line_search_of(PRESETS[preset]["growth"]).options
    assert set(options) == set(VALUES)
    names = ", ".join(["growth", "slope", "direction", "probe_micro_batches", *options])
    with pytest.raises(ValueError, match=rf"unknown key 'momentum': {preset} takes {names}\.$"):
        AlsalsTrainingArguments(str(tmp_path), optim=preset, optim_args="c=0.5,momentum=0.9")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate must be a finite number of at least 0, got -1.0"),
        ({"adam_epsilon": -1e-8}, "adam_epsilon must be a finite number of at least 0, got -1e-08"),
        ({"weight_decay": float("inf")}, "weight_decay must be a finite number of at least 0, got inf"),
        ({"adam_beta1": 1.0}, r"adam_beta1 and adam_beta2 must be two numbers in \[0, 1\), got \(1.0, 0.999\)"),
        ({"adam_beta2": -0.1}, r"adam_beta1 and adam_beta2 must be two numbers in \[0, 1\), got \(0.9, -0.1\)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_bad_hyperparameter_has_the_name_of_its_training_argument(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=f"^{message}"):
        AlsalsTrainingArguments(str(tmp_path), optim="alsals", **arguments)


def test_optim_args_that_are_not_text_are_refused(tmp_path):
    with pytest.raises(TypeError, match="optim_args must be text"):
        AlsalsTrainingArguments(str(tmp_path), optim="alsals", optim_args={"c": 0.5})


def test_an_unknown_optimizer_is_named_with_what_there_is(tmp_path):
    with pytest.raises(
        ValueError, match=r"optim must be one of alsals, alsals_muon, alsals_paper, salsa, adam_sls or .*'alsal'"
    ):
        AlsalsTrainingArguments(str(tmp_path), optim="alsal")


def test_probe_micro_batches_are_no_business_of_the_optimizer(tmp_path):
    args = AlsalsTrainingArguments(str(tmp_path), optim="alsals", optim_args="probe_micro_batches=2,c=0.4")
    assert args.probe_micro_batches == 2
    assert "probe_micro_batches" not in args.alsals_kwargs()
    for optim_args in (None, "probe_micro_batches=all"):
        args = AlsalsTrainingArguments(str(tmp_path), optim="alsals", optim_args=optim_args)
        assert args.probe_micro_batches is None and "probe_micro_batches" not in args.alsals_kwargs()
    other = AlsalsTrainingArguments(str(tmp_path), optim="adamw_torch", optim_args="anything")
    assert other.probe_micro_batches is None


def test_a_learning_rate_that_is_meant_for_adamw_is_named(tmp_path, caplog):
    AlsalsTrainingArguments(str(tmp_path), optim="adamw_torch", learning_rate=1e-3)
    AlsalsTrainingArguments(str(tmp_path), optim="alsals", learning_rate=0.5)
    assert not caplog.records
    AlsalsTrainingArguments(str(tmp_path), optim="alsals", learning_rate=1e-3)
    (record,) = caplog.records
    assert "learning_rate multiplies the step size that alsals finds, and 0.001 makes it" in record.message
