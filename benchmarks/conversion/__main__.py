"""The command line; see `python -m benchmarks.conversion --help`."""

import argparse
import json
import re
import signal
import sys
from pathlib import Path

from benchmarks import conversion, machine
from benchmarks.contest import Busy
from benchmarks.conversion import contest, names, report
from benchmarks.conversion.measure import StepFailed

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, 1 where a step failed, 2 where the run cannot start, 3 where the machine was not idle."""
    parser = _parser()
    options = parser.parse_args(arguments)
    model = names.read(options.model)
    if options.command == "plan":
        from benchmarks.conversion import dry_run  # with JAX, which a run leaves to its steps

        print(dry_run.plan(model, options.workdir))
        return 0
    plan = contest.Plan(
        steps=options.steps.split(","),
        rounds=options.rounds,
        shard_size=options.shard_size,
        workdir=options.workdir,
        patience=options.patience,
        allow_busy=options.allow_busy,
    )
    if unknown := set(plan.steps) - set(contest.CHOICES):
        parser.error(f"--steps: expected some of {', '.join(contest.CHOICES)}, came {', '.join(unknown)}")
    try:
        model = model if options.size is None else model.cut(options.size)
    except ValueError as error:
        parser.error(f"--size: {error}")
    try:
        rows = contest.run(model, plan)
    except contest.NoRoom as error:
        return _failed(error, 2)
    except StepFailed as error:
        return _failed(error, 1)
    except Busy as error:
        return _failed(f"not measured: {error}; stop what else runs, or go on with --allow-busy", 3)
    about = machine.describe()
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report.as_json(about, model, plan, rows), indent=2) + "\n", "utf-8")
    print(report.as_markdown(about, model, plan, rows))
    return 0


def _failed(why: object, status: int) -> int:
    print(why, file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.conversion",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=conversion.__doc__,
    )
    parser.add_argument("--model", default="idefics-9b", choices=names.available(), help="default: %(default)s")
    parser.add_argument(
        "--size", type=_bytes, default="3.3GB", help="keep as many layers as fit, or `full`; default: %(default)s"
    )
    parser.add_argument(
        "--steps",
        default=",".join(contest.CHOICES),
        help="some of these; there is always a conversion; default: %(default)s",
    )
    parser.add_argument("--rounds", type=int, default=contest.Plan.rounds, help="default: %(default)s")
    parser.add_argument("--shard-size", default=contest.Plan.shard_size, help="default: %(default)s")
    parser.add_argument(
        "--workdir", type=Path, default=contest.Plan.workdir, help="on the disk to measure; default: %(default)s"
    )
    parser.add_argument("--json", type=Path, default=Path("build/conversion.json"), help="default: %(default)s")
    parser.add_argument(
        "--patience", type=float, default=contest.Plan.patience, help="seconds to wait for an idle machine"
    )
    parser.add_argument("--allow-busy", action="store_true", help="go on beside other work; the table says so")
    plan = parser.add_subparsers(dest="command", metavar="plan MODEL").add_parser(
        "plan", help="plan the conversion of a whole checkpoint, without its weights"
    )
    plan.add_argument("model", choices=names.available())
    return parser


def _bytes(text: str) -> int | None:
    """The bytes that a text such as 3.3GB means; None for `full`."""
    if text == "full":
        return None
    found = re.fullmatch(r"([0-9.]+) ?([KMG]?)B?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"expected a size such as 3.3GB, or full, came {text!r}")
    return int(float(found[1]) * UNITS[found[2]])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that a run cleans up after itself
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
