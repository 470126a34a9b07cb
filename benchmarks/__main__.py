"""The command line; see `python -m benchmarks --help`."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from benchmarks import cases, contest, device, machine, report


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, 1 where a contestant failed, 3 where the machine was not idle."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Ours against the peers, in one table.")
    parser.add_argument("only", nargs="*", help="words that a case's title must contain, such as: batch 8 bfloat16")
    parser.add_argument("--json", type=Path, default=Path("build/benchmarks.json"), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=contest.Plan.rounds, help="default: %(default)s")
    parser.add_argument(
        "--patience", type=float, default=contest.Plan.patience, help="seconds to wait for an idle machine"
    )
    parser.add_argument("--allow-busy", action="store_true", help="go on beside other work; the table says so")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: see that all runs")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        gpu = device.gpu_name() if options.device == "gpu" else None
    except ValueError as error:
        parser.error(str(error))
    plan = contest.Plan(
        rounds=options.rounds,
        patience=options.patience,
        allow_busy=options.allow_busy,
        quick=options.quick,
        device=options.device,
    )
    if options.quick:
        plan = dataclasses.replace(plan, rounds=2, turn_seconds=0.01)

    known = [(module, case) for module in cases.MODULES for case in cases.cases(module, plan.quick)]
    chosen = [(module, case) for module, case in known if all(word in case.title for word in options.only)]
    if any(module in cases.UNDER_ROOFS for module, _ in chosen):  # which are measured in the same run
        chosen = [each for each in known if each[0] == "roofs" or each in chosen]
    if not chosen:
        parser.error(f"no case has {' and '.join(options.only)} in its title")
    rows = []
    try:
        for module, case in chosen:
            rows.append((case.title, contest.run_case(module, case, plan)))
    except contest.Busy as error:
        print(f"not measured: {error}; stop what else runs, or go on with --allow-busy", file=sys.stderr)
        return 3

    about = machine.describe() | {"gpu": gpu}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report.as_json(about, plan, rows), indent=2) + "\n", "utf-8")
    print(report.as_markdown(about, plan, rows))
    return int(any(result.error for _, results in rows for result in results))


if __name__ == "__main__":
    sys.exit(main())
