"""The workers' side of a calibration: a look at what a stock engine's attention layers are given.

A document is one prefill step, so a layer's key and value are those of the whole document: nothing
is read from the cache, whatever its layout.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

from vllm_toptheta.calibration.attention import AttentionCall
from vllm_toptheta.calibration.collect import AttentionStatistics, Collector, Share

_ARGUMENTS = inspect.signature(Attention.forward)


class CalibrationWorker:
    """Methods that vLLM adds to its workers (`worker_extension_cls`)."""

    vllm_config: Any
    model_runner: Any

    def toptheta_watch(self, num_layers: int, length: int, min_prob: float) -> None:
        """Collect statistics of every document from here on.

        Args:
            num_layers: of the model.
            length: tokens of every document.
            min_prob: attention probability below which keys are dropped where weights are fitted.
        """
        runner = self.model_runner
        pipelined = self.vllm_config.parallel_config.pipeline_parallel_size > 1
        if pipelined and getattr(runner, "intermediate_tensors", runner) is None:
            # Eager workers on a CPU skip it, and fail at the first step of a later stage.
            runner.profile_run()
        context = self.vllm_config.compilation_config.static_forward_context
        layers = [layer for layer in context.values() if isinstance(layer, Attention)]
        self._toptheta = _Watch(layers, num_layers, length, min_prob)

    def toptheta_share(self) -> Share | None:
        """What this worker has collected; None where none of its layers attends."""
        return self._toptheta.share()


class _Watch:
    def __init__(
        self, layers: list[Attention], num_layers: int, length: int, min_prob: float
    ) -> None:
        self._length = length
        self._layers = sorted(layers, key=lambda layer: extract_layer_index(layer.layer_name))
        self._shared = {layer.kv_sharing_target_layer_name for layer in layers}
        self._kv: dict[str, tuple[Tensor, Tensor]] = {}
        if not layers:
            return
        statistics = AttentionStatistics.empty(
            num_layers, layers[0].num_heads, layers[0].num_kv_heads, length
        )
        self._collector = Collector(statistics, min_prob)
        for layer in self._layers:
            layer.forward = self._watched(layer, layer.forward)

    def share(self) -> Share | None:
        if not self._layers:
            return None
        indices = [extract_layer_index(layer.layer_name) for layer in self._layers]
        return Share(get_tensor_model_parallel_rank(), indices, self._collector.statistics)

    def _watched(self, layer: Attention, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        # No hook of torch's: vLLM runs models of transformers by calling `forward` itself.
        @functools.wraps(forward)
        def watched(*args: Any, **kwargs: Any) -> Tensor:
            self._see(layer, *args, **kwargs)
            return forward(*args, **kwargs)

        return watched

    def _see(self, layer: Attention, *args: Any, **kwargs: Any) -> None:
        given = _ARGUMENTS.bind(layer, *args, **kwargs).arguments
        query = self._rows(given["query"], layer.num_heads, layer.head_size)
        if (target := layer.kv_sharing_target_layer_name) is not None:
            key, value = self._kv[target]
        else:
            key = self._rows(given["key"], layer.num_kv_heads, layer.head_size)
            value = self._rows(given["value"], layer.num_kv_heads, layer.head_size_v)
            if layer.layer_name in self._shared:
                self._kv[layer.layer_name] = key, value
        if layer is self._layers[0]:
            self._collector.start_document(self._length)
        sinks = getattr(layer.impl, "sinks", None)
        self._collector.add(
            AttentionCall(
                layer=extract_layer_index(layer.layer_name),
                query=query,
                key=key,
                value=value,
                sm_scale=layer.impl.scale,
                window=layer.sliding_window,
                soft_cap=layer.impl.logits_soft_cap or None,
                sinks=None if sinks is None else sinks.float(),
            )
        )

    def _rows(self, tensor: Tensor, heads: int, width: int) -> Tensor:
        """[length, heads, width] float32; steps may be padded."""
        rows = tensor.view(-1, heads, width)
        if len(rows) < self._length:
            raise ValueError(
                f"a step has {len(rows)} tokens of a document of {self._length}; expected all"
            )
        return rows[: self._length].float()
