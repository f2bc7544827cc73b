"""What the HTTP API takes and gives, as types that check a request and describe it in the OpenAPI."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError, WrapValidator
from pydantic_core import PydanticCustomError

from bigdssm.retrieval.request import Event, Request

MOST_DOCUMENTS, MOST_CHARACTERS, MOST_VALUES = 100, 10_000, 1000
ShortText = Annotated[str, Field(max_length=MOST_CHARACTERS)]
Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]  # no text that reads like one
VALUE = (
    f"needs a text of at most {MOST_CHARACTERS} characters, a finite number, a list of at most {MOST_VALUES} of these, "
    "or null"
)


def _value(value: Any, check: Any) -> Any:
    """Return a feature's value; one sentence in place of one for each type that it could have had."""
    try:
        return check(value)
    except ValidationError:
        raise PydanticCustomError("feature_value", VALUE) from None


Value = Annotated[
    ShortText | Number | Annotated[list[ShortText | Number], Field(max_length=MOST_VALUES)] | None,
    WrapValidator(_value),
]  # of a feature, as its type reads it
Top = Annotated[int, Field(ge=1, le=MOST_DOCUMENTS)]


class AskEvent(BaseModel):
    """Something that the asking user did, of the kind that the model was trained on."""

    model_config = ConfigDict(extra="forbid")

    item: ShortText = Field(description="a document, by its key or its display name; an unknown one is skipped")
    time: Number | None = Field(None, description="in the unit of now; without, events are given oldest first")
    action: ShortText | None = Field(None, description="what was done; no model reads it yet")


class Ask(BaseModel):
    """A request: what is known of who asks, and which documents may answer."""

    model_config = ConfigDict(extra="forbid")

    user: ShortText | None = Field(None, description="a user of the dataset, whose features and events come first")
    document: ShortText | None = Field(None, description="the key of the document that the query is")
    features: dict[ShortText, Value] | None = Field(None, max_length=MOST_VALUES, description="values of features")
    events: list[AskEvent] | None = Field(None, max_length=MOST_VALUES, description="what the user did since")
    now: Number | None = Field(None, description="events after it are not known yet")
    filter: ShortText | None = Field(None, description="which documents may be found, as in year >= 1990")
    exclude_seen: StrictBool | None = Field(None, description="whether documents of events stay out; none: as trained")
    top: Annotated[int, Field(ge=1, le=MOST_DOCUMENTS, strict=True)] = 10

    def request(self) -> Request:
        """Return it as the library takes it."""
        events = None if self.events is None else [Event(**event.model_dump()) for event in self.events]
        return Request(**{**{name: getattr(self, name) for name in Ask.model_fields}, "events": events})


class AskWhy(Ask):
    """A request, and a document that may have answered it."""

    answer: ShortText = Field(description="its key")


class Refusal(BaseModel):
    """Why a request is not answered."""

    error: str
