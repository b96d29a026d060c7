"""The arguments of a server and documents in, attention statistics out: a stock vLLM engine reads
them, so that architectures, quantisation, parallelism and devices are its business.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, NoReturn

from pydantic import ValidationError
from torch import Tensor
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.executor import Executor

from vllm_toptheta.backend.unsupported import check_engine
from vllm_toptheta.calibration.collect import AttentionStatistics, merge
from vllm_toptheta.hooks.attention_backend import NAME
from vllm_toptheta.model_identity import ModelIdentity

_DEFAULTS = (
    "decode_context_parallel_size",
    "ec_transfer_config",
    "enable_chunked_prefill",
    "enable_dbo",
    "kv_cache_dtype",
    "kv_cache_dtype_skip_layers",
    "kv_offloading_size",
    "kv_sharing_fast_prefill",
    "kv_transfer_config",
    "long_prefill_token_threshold",
    "long_prefill_token_threshold_adaptive",
    "max_num_active_seqs",
    "max_num_scheduled_tokens",
    "num_gpu_blocks_override",
    "prefill_context_parallel_size",
    "spec_method",
    "spec_model",
    "spec_tokens",
    "speculative_config",
    "ubatch_size",
)
"""Arguments of a server that say how it schedules and stores. Attention scores do not depend on
them, and a document would come in parts."""
_SPARE_BYTES = 1 << 29
"""Of KV cache, for the states of layers that do not attend."""


def parse_serve_flags(model: str, flags: Sequence[str]) -> EngineArgs:
    """Read flags as `vllm serve` does.

    Args:
        model: repository or folder.
        flags: any that `vllm serve` takes.

    Raises:
        ValueError: one of them is unknown or has an impossible value.
    """
    # Only the command line needs it, and it loads a server.
    from vllm.entrypoints.launchers.cli_args import make_arg_parser

    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
    parser.error = _refuse
    parsed = parser.parse_args(list(flags))
    if parsed.model_tag is not None:
        raise ValueError(f"{parsed.model_tag!r} after -- is no flag of vllm serve")
    parsed.model = model
    return EngineArgs.from_cli_args(parsed)


@dataclass(frozen=True)
class Engine:
    """An engine that is to calibrate; nothing of it is started.

    Attributes:
        config: vLLM's `VllmConfig`.
        identity: the model.
        length: tokens per document.
    """

    config: Any
    identity: ModelIdentity
    length: int

    @classmethod
    def create(
        cls, engine_args: EngineArgs, name: str, length: int | None, default_length: int
    ) -> "Engine":
        """Check everything that can be checked before weights are read.

        Args:
            engine_args: those of a server.
            name: model name to record.
            length: tokens per document; None for the default, or what the model has positions for.
            default_length: see there.

        Raises:
            OSError: there is no such model.
            ValueError: the model cannot be calibrated, or not with these arguments or this length.
        """
        engine_args = _plain(engine_args)
        try:
            model = engine_args.create_model_config()
            # One position is for the token that an engine always generates.
            longest = model.max_model_len - 1
            if length is not None and length > longest:
                raise ValueError(
                    f"length {length} is too long, expected at most {longest}: "
                    f"{model.max_model_len} positions, one of them for a generated token"
                )
            chosen = length or min(default_length, longest)
            AttentionStatistics.check_length(chosen)
            identity = ModelIdentity.from_config(
                model.hf_text_config, name, max_len=model.max_model_len
            )
            short = ModelIdentity.from_config(model.hf_text_config, name, max_len=chosen + 1)
            # A shorter engine needs less memory. LongRoPE would choose other factors in it.
            max_len = chosen + 1 if short.fields == identity.fields else model.max_model_len
            config = replace(
                engine_args,
                max_model_len=max_len,
                max_num_batched_tokens=chosen + 1,
                kv_cache_memory_bytes=_SPARE_BYTES
                + 2
                * model.dtype.itemsize
                * identity.num_layers
                * identity.num_kv_heads
                * identity.head_dim
                * max_len,
            ).create_engine_config()
        except ValidationError as error:
            reasons = [e["msg"].removeprefix("Value error, ") for e in error.errors()]
            raise ValueError("; ".join(reasons)) from error
        check_model(config, identity)
        return cls(config, identity, chosen)

    def tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            ValueError: a flag says that there is none.
        """
        tokenizer = cached_tokenizer_from_config(self.config.model_config)
        if tokenizer is None:
            raise ValueError("there is no tokenizer to read text with; drop --skip-tokenizer-init")
        return tokenizer

    def read(
        self,
        documents: Iterable[Tensor],
        min_prob: float,
        report: Callable[[int], object] | None = None,
    ) -> AttentionStatistics:
        """Start the engine, let it read documents, and stop it.

        Args:
            documents: token ids, [length] int64 each.
            min_prob: attention probability below which keys are dropped where weights are fitted.
            report: told the number of tokens after each document.
        """
        identity = self.identity
        # Of executors with several workers: a step computes statistics as well.
        os.environ.setdefault("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "3600")
        engine = LLMEngine(
            vllm_config=self.config,
            executor_class=Executor.get_class(self.config),
            log_stats=False,
            multiprocess_mode=False,
        )
        try:
            engine.collective_rpc(
                "toptheta_watch", args=(identity.num_layers, self.length, min_prob)
            )
            one_token = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
            for number, document in enumerate(documents):
                prompt = {"prompt_token_ids": document.tolist()}
                engine.add_request(str(number), prompt, one_token)
                while engine.has_unfinished_requests():
                    engine.step()
                if report is not None:
                    report(document.numel())
            shares = engine.collective_rpc("toptheta_share")
        finally:
            engine.engine_core.shutdown()
        shares = [share for share in shares if share is not None]
        statistics = merge(shares, identity.num_heads, identity.num_kv_heads)
        unseen = [
            layer
            for layer in sorted({layer for share in shares for layer in share.layers})
            if not statistics.count[layer].any()
        ]
        if unseen or not shares:
            raise RuntimeError(
                f"{identity.name}: attention of layers {unseen} was not seen; this vLLM calls them "
                "in another way than the tested versions"
            )
        return statistics


def _refuse(message: str) -> NoReturn:
    raise ValueError(f"{message}; `vllm serve --help=all` lists the flags after --")


def check_model(config: Any, identity: ModelIdentity) -> None:
    """Raise ValueError for a model that cannot be calibrated.

    Args:
        config: vLLM's `VllmConfig`.
        identity: the model.
    """
    check_engine(config)
    if not identity.uniform:
        raise ValueError(
            f"{identity.name}: layers differ in kv heads, and a table has as many for all; serve "
            "the model without one"
        )


def _plain(engine_args: EngineArgs) -> EngineArgs:
    """The same server without what does not change attention scores, a document a step."""
    attention = engine_args.attention_config
    per_kind = (attention.backend_per_kind or {}).items()
    defaults = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(engine_args)
        if field.name in _DEFAULTS or field.name.startswith("data_parallel")
    }
    return replace(
        engine_args,
        **defaults,
        attention_backend=_not_ours(engine_args.attention_backend),
        attention_config=replace(
            attention,
            backend=_not_ours(attention.backend),
            backend_per_kind={kind: b for kind, b in per_kind if _not_ours(b)},
        ),
        enable_prefix_caching=False,
        enforce_eager=True,
        max_num_seqs=1,
        worker_extension_cls="vllm_toptheta.calibration.worker.CalibrationWorker",
    )


def _not_ours(backend: Any) -> Any:
    """An attention backend that is not this plug-in's; the flags of a server may name it."""
    return None if str(getattr(backend, "name", backend)).upper() == NAME else backend
