import sys

import pytest
from written_runs import ADAMW_LOGS, write_run

from hf_alsals.cli import main


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["hf-alsals", *map(str, args)])
    main()


@pytest.mark.parametrize("output", [None, "page.html"])
def test_a_report_is_written(output, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "out" / "digits", ADAMW_LOGS)
    run(monkeypatch, "report", "out/digits", *(["--output", output] if output else []))
    path = capsys.readouterr().out.strip()
    assert path == (output or "out/digits/report.html")
    assert "<title>Run digits</title>" in (tmp_path / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("output", [None, "out/page.html"])
def test_a_comparison_is_written(output, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runs = [write_run(tmp_path / "out" / name, ADAMW_LOGS) for name in ("one", "two", "three")]
    run(monkeypatch, "compare", *runs, *(["--output", output] if output else []))
    path = capsys.readouterr().out.strip()
    assert path == (output or "compare.html")
    assert "<title>Comparison of 3 runs</title>" in (tmp_path / path).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["report", "absent"],
            "run_dir must be a folder with a trainer_state.json in it or in a checkpoint of it, got 'absent'.",
        ),
        (
            ["compare", "run", "."],
            "run_dir must be a folder with a trainer_state.json in it or in a checkpoint of it, got '.'.",
        ),
        (["compare", "run"], "run_dir must name two or more runs, got 'run'."),
        (
            ["report", "run", "--output", "absent/page.html"],
            "output must be a file that can be written, got 'absent/page.html': No such file or directory.",
        ),
        (
            ["compare", "run", "run", "--output", "run"],
            "output must be a file that can be written, got 'run': Is a directory.",
        ),
        (["report", "run", "--output", ""], "output must be a file that can be written, got ''"),
        ([], "the following arguments are required: command"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", ADAMW_LOGS)
    with pytest.raises(SystemExit) as exit_:
        run(monkeypatch, *args)
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err.strip().splitlines()[-1]
    assert captured.out == ""
    assert not list(tmp_path.rglob("*.html"))
