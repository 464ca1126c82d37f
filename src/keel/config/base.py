"""The base class of all settings, and the types that several sections share."""

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]
CountOrNone = Annotated[int, Field(ge=0)]
Dtype = Literal["float32", "bfloat16"]
Quantization = Literal["nf4", "int8"]


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    main_settings: ClassVar[tuple[str, ...]] = ()
    """Dotted names that `keel VERB --help` lists, in this order; empty: all. Declared by the class of the verb, because
    verbs that share a section list different settings of it."""
