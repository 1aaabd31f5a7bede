"""What every block of a recipe is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Block(BaseModel):
    """Base of every block: unknown keys are errors, values are checked on assignment, nothing is coerced silently."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, strict=False, use_attribute_docstrings=True)
