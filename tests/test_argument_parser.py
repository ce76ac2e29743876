import json
from dataclasses import dataclass, field

import pytest
import yaml

from hf_alsals import AlsalsArgumentParser


@dataclass
class Arguments:
    rate: float = 1.0
    steps: int = 10
    fast: bool = True
    names: list[str] = field(default_factory=list)
    options: dict | str | None = None
    text: str | None = field(default=None, metadata={"aliases": ["--words"]})

    def __post_init__(self):
        if isinstance(self.options, str):
            self.options = json.loads(self.options)
        if self.steps < 0:
            raise ValueError(f"steps must be at least 0, got {self.steps}.")


CONFIG = {"rate": 1e-3, "steps": 5, "fast": False, "names": ["a", "b"], "options": {"k": 1}, "words": "x: y"}


def parse(*args):
    (arguments,) = AlsalsArgumentParser(Arguments).parse_args_and_config([*args])
    return arguments


@pytest.mark.parametrize("suffix", ["yaml", "yml", "json"])
def test_a_config_holds_every_kind_of_value_and_flags_override_it(suffix, tmp_path):
    path = tmp_path / f"config.{suffix}"
    path.write_text(json.dumps(CONFIG) if suffix == "json" else yaml.safe_dump(CONFIG))
    assert parse(str(path)) == Arguments(1e-3, 5, False, ["a", "b"], {"k": 1}, "x: y")
    assert parse(str(path), "--steps", "7", "--names", "c") == Arguments(1e-3, 7, False, ["c"], {"k": 1}, "x: y")


def test_yaml_writes_numbers_its_own_way(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("rate: 1e-3\nsteps: 1_000\ntext: null\n")  # PyYAML reads 1e-3 as a string
    assert parse(str(path)) == Arguments(rate=1e-3, steps=1000, text=None)


def test_a_word_that_yaml_takes_for_a_boolean_stays_a_word(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("text: no\nfast: no\nnames: [on, off]\n")
    assert parse(str(path)) == Arguments(text="no", fast=False, names=["on", "off"])


def test_an_empty_list_is_nothing(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("names: []\n")
    assert parse(str(path)) == Arguments()


def test_flags_alone():
    assert parse("--fast", "false", "--rate", "2") == Arguments(rate=2.0, fast=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 5", "--stepz"),
        ("steps: many", "'many'"),
        ("steps: -1", "steps must be at least 0, got -1."),
        ("- steps", "must hold names and values, got ['steps']"),
        ("steps: [1", "cannot be read"),
    ],
)
def test_a_bad_config_ends_in_one_line_that_names_the_fault(text, message, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as error:
        parse(str(path))
    assert error.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_config_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit):
        parse("nowhere.yaml")
    assert "'nowhere.yaml' cannot be read" in capsys.readouterr().err.strip().splitlines()[-1]
