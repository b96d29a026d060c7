"""What requests ask for, resolved as request intake does it."""

from collections.abc import Mapping
from typing import Any

from vllm_toptheta.backend.dial import Dial, RowPlan
from vllm_toptheta.requests import RequestOptions, Resolved


def resolve(plan: Any, options: Mapping[int, RequestOptions]) -> dict[int, Resolved]:
    """Options by row, on top of those of an engine's `Plan`."""
    return {row: Resolved.of(one, plan.targets) for row, one in options.items()}


class AskedDial(Dial):
    """A dial that takes options as requests ask for them."""

    def plan(self, seq_lens: Any, options: Any, *args: Any, **kwargs: Any) -> RowPlan:
        return super().plan(seq_lens, resolve(self._plan, options), *args, **kwargs)
