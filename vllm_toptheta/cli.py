"""The `toptheta` command: arguments in, one call, text out. Heavy modules load inside the
subcommands only.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_toptheta.evaluation.tasks import command as tasks


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Args:
        argv: arguments after the program's name; those of the process by default.
    """
    own, flags = list(sys.argv[1:] if argv is None else argv), []
    if own[:1] == ["calibrate"] and "--" in own:
        cut = own.index("--")
        own, flags = own[:cut], own[cut + 1 :]
    arguments = _parser().parse_args(own, argparse.Namespace(serve_flags=flags))
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
    _add_fidelity(
        what.add_parser(
            "fidelity", help="KL divergence from dense and rows read: Top-theta and its rivals"
        )
    )
    _add_engine(
        what.add_parser("engine", help="perplexity through vLLM: stock, and with pruned rows")
    )
    _add_needle(
        what.add_parser("needle", help="find a number in a long text through vLLM, both ways")
    )
    tasks.add_arguments(
        what.add_parser("tasks", help="accuracy through a running server, paired with dense")
    )
    doctor = commands.add_parser("doctor", help="check the installation")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_model(parser: argparse.ArgumentParser, dtype: str = "float32") -> None:
    parser.add_argument("model", metavar="MODEL", help="Hugging Face repository or folder")
    parser.add_argument("--dtype", default=dtype, help="torch dtype or auto (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")


def _add_engine(parser: argparse.ArgumentParser) -> None:
    _add_engines(parser)
    parser.add_argument("--text", nargs="+", type=Path, required=True, metavar="FILE", help="text")
    parser.add_argument(
        "--length", type=int, default=2048, help="tokens per document (default: %(default)s)"
    )
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        help="of these, the prompt; the rest is decoded (default: half of them)",
    )
    parser.add_argument("--documents", type=int, default=4, help="documents (default: %(default)s)")
    parser.set_defaults(run=_engine)


def _add_needle(parser: argparse.ArgumentParser) -> None:
    _add_engines(parser)
    parser.add_argument(
        "--text",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="haystack (default: Python's own documentation)",
    )
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=int,
        default=[1024, 2048, 4096, 8000],
        help="tokens of a text (default: 1024 2048 4096 8000)",
    )
    parser.add_argument(
        "--depths",
        nargs="+",
        type=float,
        default=[0, 0.25, 0.5, 0.75, 1],
        help="where the number is, 0 first, 1 last (default: 0 0.25 0.5 0.75 1)",
    )
    parser.set_defaults(run=_needle)


def _add_engines(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="Hugging Face repository or folder")
    parser.add_argument("--dtype", default="float32", help="torch dtype (default: %(default)s)")
    parser.add_argument(
        "--phases",
        nargs="+",
        choices=("decode", "prefill", "both"),
        default=["both"],
        help="rows to prune (default: both)",
    )
    _add_dial(parser)
    parser.add_argument(
        "--prefill-min-prob",
        nargs="+",
        type=float,
        default=[],
        metavar="P",
        help="the same of prompt rows with --phases both (default: as for the others)",
    )
    parser.add_argument(
        "--min-kv-len",
        type=int,
        default=128,
        help="rows of at most so many keys are dense (default: %(default)s)",
    )
    parser.add_argument(
        "--chunk", type=int, default=1024, help="prompt tokens a step (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results as JSON")


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    parser.usage = "toptheta calibrate MODEL [options] [-- any flags of vllm serve]"
    parser.add_argument("model", metavar="MODEL", help="Hugging Face repository or folder")
    parser.add_argument("--dtype", help="the same after -- (default: as vllm serve)")
    parser.add_argument(
        "--text",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="text (default: Python's own docs and code)",
    )
    parser.add_argument(
        "--tokens", type=int, default=16384, help="tokens to read (default: %(default)s)"
    )
    parser.add_argument(
        "--length",
        type=int,
        help="tokens per document (default: 4096, or what the model has positions for)",
    )
    parser.add_argument(
        "--min-prob",
        type=float,
        help="attention probability to fit the compensation at (default: the server's)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="table to write (default: in the user's store)"
    )
    parser.add_argument("--name", help="model name to record, org/model (default: from MODEL)")
    parser.set_defaults(run=_calibrate)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", type=Path, metavar="TABLE", help="threshold table")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_inspect)


def _add_fidelity(parser: argparse.ArgumentParser) -> None:
    _add_model(parser, dtype="auto")
    parser.add_argument("--text", nargs="+", type=Path, required=True, metavar="FILE", help="text")
    parser.add_argument(
        "--length", type=int, default=4096, help="tokens per document (default: %(default)s)"
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=256,
        help="last tokens of a document that run pruned (default: %(default)s)",
    )
    parser.add_argument("--documents", type=int, default=1, help="documents (default: %(default)s)")
    _add_dial(parser)
    parser.add_argument("--min-mass", type=float, help="floor on the kept mass (default: server's)")
    parser.add_argument(
        "--thresholds",
        default="auto",
        metavar="TABLE",
        help="auto, none, name or path (default: auto)",
    )
    parser.add_argument(
        "--no-table",
        action="store_true",
        help="also every --min-prob as a model runs that nobody calibrated",
    )
    parser.add_argument(
        "--k-sketch",
        action="store_true",
        help="also every --min-prob over the 8-bit sketch of K",
    )
    parser.add_argument(
        "--rivals",
        nargs="*",
        metavar="NAME:SETTING",
        help="other rules, such as top_k:64; without names a choice of them",
    )
    parser.add_argument(
        "--min-kv-len", type=int, default=1024, help="rows of at most so many keys are dense"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results as JSON")
    parser.set_defaults(run=_fidelity)


def _add_dial(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--min-prob",
        nargs="+",
        type=float,
        default=[],
        metavar="P",
        help="attention probabilities below which V rows are not read (default: the server's)",
    )
    parser.add_argument(
        "--k", nargs="+", type=float, default=[], help="target keys per row, by the table"
    )


def _calibrate(arguments: argparse.Namespace) -> int:
    from vllm_toptheta.threshold_store import ThresholdStore

    _quiet("ERROR")  # it warns of what is chosen for calibration
    from vllm_toptheta.calibration.calibrate import (
        CalibrationOptions,
        calibrate,
        check_writable,
        read_corpus,
    )
    from vllm_toptheta.calibration.engine import parse_serve_flags

    options = CalibrationOptions(num_tokens=arguments.tokens, length=arguments.length)
    if arguments.min_prob is not None:
        options = replace(options, min_prob=arguments.min_prob)
    check_writable(arguments.out or ThresholdStore().user_dir / "table")
    flags = [*(["--dtype", arguments.dtype] if arguments.dtype else []), *arguments.serve_flags]
    table = calibrate(
        parse_serve_flags(arguments.model, flags),
        read_corpus(arguments.text),
        options,
        name=arguments.name,
    )
    metadata = table.metadata
    path = arguments.out or ThresholdStore().path_for(metadata.identity, str(metadata.length))
    table.save(path)
    print(f"wrote {path}: k {table.min_k:g} to {table.max_k:g}")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from vllm_toptheta.calibration.summary import summarize, to_text
    from vllm_toptheta.thresholds import ThresholdTable

    summary = summarize(ThresholdTable.load(arguments.table))
    print(json.dumps(summary, indent=2) if arguments.json else to_text(summary))
    return 0


def _fidelity(arguments: argparse.Namespace) -> int:
    from vllm_toptheta.evaluation.fidelity import HEADINGS, compare_rules
    from vllm_toptheta.evaluation.rules import DEFAULT_RIVALS

    print(HEADINGS)
    results = compare_rules(
        arguments.model,
        arguments.text,
        length=arguments.length,
        rows=arguments.rows,
        num_documents=arguments.documents,
        min_probs=_min_probs(arguments),
        ks=arguments.k,
        min_mass=arguments.min_mass,
        table=arguments.thresholds,
        without_table=arguments.no_table,
        k_sketch=arguments.k_sketch,
        rivals=() if arguments.rivals is None else arguments.rivals or DEFAULT_RIVALS,
        min_kv_len=arguments.min_kv_len,
        dtype=arguments.dtype,
        device=arguments.device,
        report=lambda result: print(result.to_row(), flush=True),
    )
    _write_json(arguments, results)
    return 0


def _min_probs(arguments: argparse.Namespace) -> Sequence[float]:
    from vllm_toptheta.config import TopThetaConfig

    given: list[float] = arguments.min_prob
    return given or ([] if arguments.k else [TopThetaConfig().min_prob])


def _engine(arguments: argparse.Namespace) -> int:
    pruned = _variants(arguments)
    from vllm_toptheta.evaluation.engine import HEADINGS, compare_engines

    print(HEADINGS)
    results = compare_engines(
        arguments.model,
        arguments.text,
        pruned,
        length=arguments.length,
        prompt_tokens=arguments.prompt_tokens or arguments.length // 2,
        num_documents=arguments.documents,
        chunk=arguments.chunk,
        dtype=arguments.dtype,
        report=lambda result: print(result.to_row(), flush=True),
    )
    _write_json(arguments, results)
    return 0


def _needle(arguments: argparse.Namespace) -> int:
    pruned = _variants(arguments)
    from vllm_toptheta.evaluation.needle import HEADINGS, compare_needles

    print(HEADINGS)
    results = compare_needles(
        arguments.model,
        arguments.text,
        pruned,
        lengths=arguments.lengths,
        depths=arguments.depths,
        chunk=arguments.chunk,
        dtype=arguments.dtype,
        report=lambda line: print(line, flush=True),
    )
    _write_json(arguments, results)
    return 0


def _write_json(arguments: argparse.Namespace, results: Sequence[Any]) -> None:
    from vllm_toptheta.evaluation.results import write_json

    if arguments.json:
        write_json(arguments.json, results)


def _variants(arguments: argparse.Namespace) -> list[Mapping[str, Any]]:
    _quiet()
    from vllm_toptheta.evaluation.engine import variants

    return variants(
        arguments.phases,
        _min_probs(arguments),
        arguments.k,
        arguments.prefill_min_prob,
        arguments.min_kv_len,
    )


def _quiet(level: str = "WARNING") -> None:
    # vLLM reads them when it is imported; the log of every start would bury the table.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", level)
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")


def _doctor(_: argparse.Namespace) -> int:
    from vllm_toptheta import doctor

    return doctor.main()


if __name__ == "__main__":
    sys.exit(main())
