"""The command `hf-alsals`: a script with another optimizer, and web pages on runs."""

import argparse
import os

from .run_script import ScriptError, run_script


def main() -> None:
    """Do what the command line asks for: run a script, or write a page and print its path."""
    parser = argparse.ArgumentParser(
        prog="hf-alsals", description="Run a script with --optim alsals, or write a web page on one run or on several."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run",
        help="run a script that uses the Trainer of transformers, with --optim alsals among its arguments",
        usage="hf-alsals run [-m] SCRIPT --optim alsals [--optim_args ...] [arguments of the script]",
        allow_abbrev=False,
    )
    run.add_argument("-m", "--module", action="store_true", help="SCRIPT is the name of a module, as for python -m")
    run.add_argument("script", metavar="SCRIPT", help="the path of the script")
    run.add_argument("script_args", nargs=argparse.REMAINDER, help="its command line")
    one = commands.add_parser("report", help="what a run did: warnings, numbers, curves and settings")
    one.add_argument("run_dir", help="the output directory of the run, which may still be going on")
    one.add_argument("--output", help="the page to write (default: report.html in run_dir)")
    several = commands.add_parser("compare", help="how runs compare: numbers, curves and the settings that differ")
    several.add_argument("run_dirs", nargs="+", metavar="run_dir", help="the output directories of two or more runs")
    several.add_argument("--output", default="compare.html", help="the page to write (default: %(default)s)")
    args = parser.parse_args()
    if args.command == "run":
        try:
            run_script(args.script, args.script_args, args.module)
        except ScriptError as error:
            run.error(str(error))
        return
    _write_page(parser, args)


def _write_page(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    from .report import (  # imports transformers, which a script that runs as it is may want to do itself
        compare,
        report,
    )

    if args.command == "compare" and len(args.run_dirs) < 2:
        parser.error(f"run_dir must name two or more runs, got {args.run_dirs[0]!r}.")
    try:
        page = report(args.run_dir) if args.command == "report" else compare(args.run_dirs)
    except ValueError as error:
        parser.error(str(error))
    output = os.path.join(args.run_dir, "report.html") if args.output is None else args.output
    try:
        with open(output, "w", encoding="utf-8") as file:
            file.write(page)
    except OSError as error:
        parser.error(f"output must be a file that can be written, got {output!r}: {error.strerror}.")
    print(output)


if __name__ == "__main__":
    main()
