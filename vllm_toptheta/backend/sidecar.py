"""Side data that lives beside K and V inside every page of the paged cache: a cache spec in, a larger page out.

A page holds, per (block, kv head), K, V and then the side data. Because it is part of the page, vLLM accounts for its
memory, shares it through the prefix cache, and moves it with the block. Each kind of side data is a number of elements
per token; today there is one kind, the V means of compensation groups.
"""

from dataclasses import replace
from typing import Any

from vllm.utils.torch_utils import get_dtype_size

from vllm_toptheta.kernels.api import PageLayout


def enlarge_page(spec: Any, group_size: int) -> Any:
    """Make room for the side data in a layer's cache spec; does nothing the second time.

    Args:
        spec: vLLM's `AttentionSpec` of one layer, with K and V of the same width.
        group_size: tokens per compensation group.
    """
    if spec.state_content_bytes is not None:
        return spec
    if spec.head_size_v != spec.head_size:
        raise ValueError(
            f"toptheta needs K and V of one width, this model has {spec.head_size} and "
            f"{spec.head_size_v}; serve it with another --attention-backend"
        )
    # The size per token does not depend on the block, whose size vLLM may still change.
    layout = PageLayout(group_size, spec.head_size, group_size)
    return replace(spec, state_content_bytes=layout.content_elements * get_dtype_size(spec.dtype))
