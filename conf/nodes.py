"""What the schema's parts are made of: types with a range, durations, components, and the node that refuses unknown keys."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict

from .duration import Duration


def _duration(value: Any) -> Any:
    Duration.parse(value)
    return value


def _component(value: dict[str, Any]) -> dict[str, Any]:
    if "_target_" not in value:
        raise ValueError("needs a _target_; choose an option of this group")
    return value


Length = Annotated[int | float | str, AfterValidator(_duration)]
"""A duration: `2000` (steps), `"500k samples"`, `"3 epochs"`."""
Component = Annotated[dict[str, Any], AfterValidator(_component)]
"""A node with `_target_`."""
Varying = float | dict[str, Any] | str
"""A number, or a schedule over sampling progress: `{kind: step, value: 1.75, start: 0.18}` or `"step:1.75,start=0.18"`."""
Text = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, int | float) else value)]


class Node(BaseModel):
    """A part of the config; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")
