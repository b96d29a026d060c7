"""The `toptheta` command: arguments in, one call, text out. Heavy modules load inside the
subcommands only.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Args:
        argv: arguments after the program's name; those of the process by default.
    """
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        return code
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"toptheta: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="toptheta", description="Top-theta attention for vLLM.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_calibrate(commands.add_parser("calibrate", help="measure a model's thresholds"))
    _add_inspect(commands.add_parser("inspect", help="show what a threshold table holds"))
    evaluate = commands.add_parser("evaluate", help="measure what pruning does to a model")
    what = evaluate.add_subparsers(required=True, metavar="WHAT")
    _add_perplexity(
        what.add_parser(
            "perplexity", help="perplexity and rows read: dense, exact top-k, Top-theta"
        )
    )
    _add_prompts(
        what.add_parser("prompts", help="perplexity through vLLM's engine with pruned prompts")
    )
    doctor = commands.add_parser("doctor", help="check the installation")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="Hugging Face repository or folder")
    parser.add_argument(
        "--dtype", default="float32", help="torch dtype or auto (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="Hugging Face repository or folder")
    parser.add_argument("--text", nargs="+", type=Path, metavar="FILE", required=True)
    parser.add_argument("--dtype", default="float32", help="torch dtype (default: %(default)s)")
    parser.add_argument("--k", type=float, nargs="+", default=[128], help="prefill_k to try")
    parser.add_argument("--length", type=int, default=2048, help="tokens a prompt")
    parser.add_argument("--documents", type=int, default=2, help="prompts")
    parser.add_argument("--min-kv-len", type=int, default=128, help="shorter rows are dense")
    parser.add_argument("--chunk", type=int, default=1024, help="prompt tokens a step")
    parser.set_defaults(run=_prompts)


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument(
        "--text",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="text (default: Python's own docs and code)",
    )
    parser.add_argument(
        "--tokens", type=int, default=65536, help="tokens to read (default: %(default)s)"
    )
    parser.add_argument(
        "--length", type=int, default=4096, help="tokens per document (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="table to write (default: in the user's store)"
    )
    parser.add_argument(
        "--allocation",
        choices=("lost_mass", "uniform"),
        default="lost_mass",
        help="how k is divided among heads (default: %(default)s)",
    )
    parser.add_argument(
        "--tac-k",
        type=int,
        default=0,
        help="top-k at calibration, 0 for dense (default: %(default)s)",
    )
    parser.add_argument(
        "--group-size",
        type=int,
        default=16,
        help="tokens per compensation group (default: %(default)s)",
    )
    parser.add_argument("--name", help="model name to record, org/model (default: from MODEL)")
    parser.set_defaults(run=_calibrate)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", type=Path, metavar="TABLE", help="threshold table")
    parser.add_argument("--k", type=float, default=128, help="k to show (default: %(default)s)")
    parser.add_argument(
        "--length",
        type=int,
        default=4096,
        help="row length to show theta at (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_inspect)


def _add_perplexity(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--text", nargs="+", type=Path, required=True, metavar="FILE", help="text")
    parser.add_argument(
        "--length", type=int, default=2048, help="tokens per document (default: %(default)s)"
    )
    parser.add_argument("--documents", type=int, default=4, help="documents (default: %(default)s)")
    parser.add_argument(
        "--k",
        nargs="+",
        type=float,
        default=[64, 128],
        help="target keys per row (default: 64 128)",
    )
    parser.add_argument(
        "--table",
        nargs="+",
        default=["auto"],
        metavar="TABLE",
        help="tables to compare: auto, name or path (default: auto)",
    )
    parser.add_argument(
        "--min-kv-len", type=int, default=0, help="rows of at most so many keys are dense"
    )
    parser.add_argument(
        "--group-size",
        nargs="+",
        type=int,
        default=[16],
        help="tokens per compensation group (default: 16)",
    )
    parser.add_argument(
        "--compensation",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compensate the lost mass (default: yes)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results as JSON")
    parser.set_defaults(run=_perplexity)


def _calibrate(arguments: argparse.Namespace) -> int:
    from vllm_toptheta.calibration.calibrate import CalibrationOptions, calibrate_with_progress
    from vllm_toptheta.threshold_store import ThresholdStore

    options = CalibrationOptions(
        num_tokens=arguments.tokens,
        length=arguments.length,
        allocation=arguments.allocation,
        tac_k=arguments.tac_k,
        group_size=arguments.group_size,
    )
    table = calibrate_with_progress(
        arguments.model,
        arguments.text,
        options,
        name=arguments.name,
        dtype=arguments.dtype,
        device=arguments.device,
    )
    stem = f"{arguments.length}-{arguments.allocation}"
    path = arguments.out or ThresholdStore().path_for(table.metadata.identity, stem)
    table.save(path)
    print(f"wrote {path}: k {float(table.levels[0]):g} to {float(table.levels[-1]):g}")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from vllm_toptheta.calibration.summary import summarize, to_text
    from vllm_toptheta.thresholds import ThresholdTable

    summary = summarize(ThresholdTable.load(arguments.table), arguments.k, arguments.length)
    print(json.dumps(summary, indent=2) if arguments.json else to_text(summary))
    return 0


def _perplexity(arguments: argparse.Namespace) -> int:
    from vllm_toptheta.evaluation.perplexity import HEADINGS, compare_tables

    print(HEADINGS)
    results = compare_tables(
        arguments.model,
        arguments.text,
        arguments.k,
        arguments.table,
        length=arguments.length,
        num_documents=arguments.documents,
        group_sizes=arguments.group_size if arguments.compensation else [None],
        min_kv_len=arguments.min_kv_len,
        dtype=arguments.dtype,
        device=arguments.device,
        report=lambda result: print(result.to_row(), flush=True),
    )
    if arguments.json:
        rows = [result.to_dict() for result in results]
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


def _prompts(arguments: argparse.Namespace) -> int:
    from vllm_toptheta.evaluation.engine import compare_prompts

    compare_prompts(
        arguments.model,
        arguments.text,
        arguments.k,
        length=arguments.length,
        num_documents=arguments.documents,
        min_kv_len=arguments.min_kv_len,
        chunk=arguments.chunk,
        dtype=arguments.dtype,
        report=lambda line: print(line, flush=True),
    )
    return 0


def _doctor(_: argparse.Namespace) -> int:
    from vllm_toptheta import doctor

    return doctor.main()


if __name__ == "__main__":
    sys.exit(main())
