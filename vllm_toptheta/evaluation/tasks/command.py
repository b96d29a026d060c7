"""`toptheta evaluate tasks`: arguments in, a table and JSON out."""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments."""
    add = parser.add_argument
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--url", help="running server with what is measured")
    who.add_argument(
        "--local", metavar="MODEL", help="repository or folder to load into this process instead"
    )
    add(
        "--rivals",
        nargs="+",
        default=[],
        metavar="NAME:SETTING",
        help="with --local: other rules, such as top_k:64, as of evaluate fidelity",
    )
    add("--model", help="name of the model it serves (default: its first)")
    add("--dense-url", help='dense server (default: the same one, with "toptheta": "off")')
    add(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="ruler, any of its thirteen tasks, kv_retrieval, humaneval, long_generation, a "
        "--jsonl file's name (default: those of the files given, else kv_retrieval)",
    )
    add("--qa", nargs="+", type=Path, default=[], metavar="FILE", help="SQuAD or HotpotQA, JSON")
    add("--humaneval", type=Path, metavar="FILE", help="HumanEval.jsonl or .jsonl.gz")
    add("--jsonl", nargs="+", type=Path, default=[], metavar="FILE", help="prompts and answers")
    add(
        "--allow-code-execution",
        action="store_true",
        help="run what the model writes, which HumanEval needs: in a child with limits",
    )
    add(
        "--lengths",
        nargs="+",
        type=int,
        default=[4096],
        help="tokens of context, question and answer (default: 4096)",
    )
    add(
        "--questions",
        type=int,
        default=50,
        help="questions of a task and length (default: %(default)s)",
    )
    add(
        "--question-rows",
        choices=("prompt", "decoded"),
        default="prompt",
        help="decoded: generate the question by force too, so that its rows are pruned; needs the "
        "server option that docs/tasks.md names (default: prompt)",
    )
    add(
        "--generate",
        type=int,
        default=512,
        help="tokens that long_generation generates, of --lengths (default: %(default)s)",
    )
    add("--chat", action="store_true", help="use the model's chat template")
    add(
        "--min-prob",
        nargs="+",
        type=float,
        default=[],
        metavar="P",
        help="ask for these settings (default: the server's)",
    )
    add("--min-mass", type=float, help="ask for this floor, with every --min-prob")
    add("--text", nargs="+", type=Path, metavar="FILE", help="haystack (default: Python's docs)")
    add("--seed", type=int, default=0, help="of contexts and questions (default: 0)")
    add("--concurrency", type=int, default=4, help="requests at a time (default: %(default)s)")
    add(
        "--records",
        type=Path,
        default=Path("toptheta-tasks.jsonl"),
        metavar="FILE",
        help="answers; a second run asks what is not there (default: %(default)s)",
    )
    add("--json", type=Path, metavar="FILE", help="also write the results as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; returns the exit code.

    Raises:
        OSError, ValueError: a server, file or number is not as it should be; says what to do.
    """
    from vllm_toptheta.evaluation.results import write_json
    from vllm_toptheta.evaluation.tasks import run as runner
    from vllm_toptheta.evaluation.tasks.haystack import read_text
    from vllm_toptheta.evaluation.tasks.records import Records
    from vllm_toptheta.evaluation.tasks.report import HEADINGS, summarise

    if arguments.rivals and not arguments.local:
        raise ValueError("--rivals answer in this process; give --local MODEL instead of --url")
    if min(arguments.questions, arguments.concurrency) < 1:
        raise ValueError("--questions and --concurrency are at least 1")
    tasks, missing = _tasks(arguments)
    plan = runner.Plan(
        tasks=tasks,
        lengths=arguments.lengths,
        questions=arguments.questions,
        seed=arguments.seed,
        text=read_text(arguments.text),
        decoded_questions=arguments.question_rows == "decoded",
        chat=arguments.chat,
        concurrency=1 if arguments.local else arguments.concurrency,
    )
    variants = _local(arguments) if arguments.local else _variants(arguments)
    records = Records(arguments.records)
    skipped = list(missing)
    try:
        answers = runner.run(plan, variants, records, skipped.append)
    finally:
        records.close()
    results = summarise(answers)
    print(HEADINGS)
    for result in results:
        print(result.to_row())
    for line in skipped:
        print(f"skipped: {line}", file=sys.stderr)
    for result in results:
        if result.warning:
            print(result.warning, file=sys.stderr)
    if arguments.json:
        write_json(arguments.json, results)
    return 0 if results else 1


def _tasks(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Tasks by name, and why others of them are missing."""
    from vllm_toptheta.evaluation.tasks import (
        generation,
        humaneval,
        retrieval,
        ruler,
        user_texts,
    )

    given: dict[str, Any] = dict(map(user_texts.question_answering, arguments.qa))
    given |= {path.stem: user_texts.json_lines(path) for path in arguments.jsonl}
    if arguments.humaneval:
        if not arguments.allow_code_execution:
            raise ValueError(
                "HumanEval runs what the model writes, in a child with limits; give "
                "--allow-code-execution if you want that"
            )
        given["humaneval"] = humaneval.humaneval(arguments.humaneval)
    long = partial(generation.long_generation, arguments.generate)
    known = {
        **ruler.TASKS,
        "kv_retrieval": retrieval.kv_retrieval,
        "long_generation": long(sampled=False),
        "long_generation_sampled": long(sampled=True),
        **given,
    }
    needs = {"qa_1": "--qa SQUAD.json", "qa_2": "--qa HOTPOT.json", "humaneval": "--humaneval FILE"}
    chosen: dict[str, Any] = {}
    missing: list[str] = []
    for name in arguments.tasks or given or ["kv_retrieval"]:
        for each in [*ruler.TASKS, "qa_1", "qa_2"] if name == "ruler" else [name]:
            if each in known:
                chosen[each] = known[each]
            elif each in needs:
                missing.append(f"{each} needs {needs[each]}")
            else:
                raise ValueError(f"no task {each!r}; give --tasks {' '.join(['ruler', *known])}")
    return chosen, missing


def _variants(arguments: argparse.Namespace) -> list[Any]:
    """How to answer, dense first."""
    from vllm_toptheta.evaluation.tasks.run import DENSE, Variant
    from vllm_toptheta.evaluation.tasks.server import Request, Server

    server = Server(arguments.url, arguments.model)
    floor = {} if arguments.min_mass is None else {"toptheta_min_mass": arguments.min_mass}
    asked = [{"toptheta_min_prob": p, **floor} for p in arguments.min_prob] or [floor]
    variants = []
    for xargs in asked:
        # One token tells the setting that a request gets, and whether the server has one.
        setting = server.complete([1], xargs, Request(max_tokens=1)).toptheta
        variants.append(Variant(_setting(setting), server, xargs))
    if arguments.dense_url:
        return [Variant(DENSE, Server(arguments.dense_url), {}), *variants]
    if setting is None:
        raise ValueError(
            f"{arguments.url} does not serve with Top-theta; give --dense-url, a dense server of "
            "the same model"
        )
    return [Variant(DENSE, server, {"toptheta": "off"}), *variants]


def _local(arguments: argparse.Namespace) -> list[Any]:
    """How to answer in this process, dense first."""
    from vllm_toptheta.config import TopThetaConfig
    from vllm_toptheta.evaluation.tasks.local import OURS, RULE, LocalModel, check_rule
    from vllm_toptheta.evaluation.tasks.run import DENSE, Variant

    for rule in arguments.rivals:
        check_rule(rule)
    probs = arguments.min_prob or ([] if arguments.rivals else [TopThetaConfig().min_prob])
    model = LocalModel(arguments.local, arguments.min_mass)
    rules = [*(f"{OURS}:{p:g}" for p in probs), *arguments.rivals]
    return [Variant(rule, model, {RULE: rule}) for rule in [DENSE, *rules]]


def _setting(toptheta: dict[str, Any] | None) -> str:
    """A name for what a request got."""
    if toptheta is None:
        return "served"
    shown = {name: toptheta[name] for name in ("min_prob", "min_mass", "k")}
    return " ".join(f"{name} {number:g}" for name, number in shown.items() if number) or "dense?"
