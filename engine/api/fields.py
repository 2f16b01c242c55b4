"""Field types of request bodies: what JSON lets through and we do not."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, StrictBool, Tag
from pydantic_core import PydanticCustomError

from scheduler.request import MAX_LOGIT_BIAS, MAX_LOGPROBS
from scheduler.urgency import MAX_PRIORITY

MAX_TOKENS_CEILING = 1 << 20
MAX_PROMPTS = 64
MAX_CHOICES = 16
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_STOP_TOKEN_IDS = 256
MAX_NAME_LENGTH = 1024
MAX_SALT_LENGTH = 256
MAX_BAD_WORDS = 128  # each may become two sequences of tokens
INT64_MAX = (1 << 63) - 1


def _integer(value: Any) -> Any:
    """JSON has one number type, so 16.0 is an integer; ``true`` and "16" are not numbers."""
    if isinstance(value, bool | str) or (isinstance(value, float) and not value.is_integer()):
        raise PydanticCustomError("int_type", "Input should be a valid integer")
    return int(value) if isinstance(value, float) else value


def _number(value: Any) -> Any:
    """Python's JSON reader takes 1e400 for infinity and reads integers of any size: both are refused here."""
    if isinstance(value, bool | str):
        raise PydanticCustomError("float_type", "Input should be a valid number")
    if isinstance(value, float) and not math.isfinite(value):
        raise PydanticCustomError("finite_number", "Input should be a finite number")
    if isinstance(value, int) and abs(value) > INT64_MAX:
        raise PydanticCustomError("number_too_large", "Input is too large a number")
    return value


def _unicode(value: str) -> str:
    r"""JSON can spell half of a surrogate pair (``"\ud800"``), which no tokenizer and no reply can take."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("string_unicode", "Input should be Unicode text, without lone surrogates") from None
    return value


def _biases(value: Any) -> Any:
    """JSON's names are strings: token ids in decimal."""
    if not isinstance(value, dict):
        raise PydanticCustomError("dict_type", "Input should be an object")
    if not all(isinstance(name, str) and name.isascii() and name.isdigit() and len(name) < 11 for name in value):
        raise PydanticCustomError("bias_token", 'Input should have token ids for names, such as "50256"')
    return {int(name): bias for name, bias in value.items()}


# The order inside Annotated is what makes both hold: the schema shows the bounds, the function runs first.
PositiveCount = Annotated[int, Field(ge=1, le=MAX_TOKENS_CEILING), BeforeValidator(_integer)]
ChoiceCount = Annotated[int, Field(ge=1, le=MAX_CHOICES), BeforeValidator(_integer)]
Seed = Annotated[int, Field(ge=-INT64_MAX - 1, le=INT64_MAX), BeforeValidator(_integer)]
CountOrZero = Annotated[int, Field(ge=0, le=MAX_TOKENS_CEILING), BeforeValidator(_integer)]
NumLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS), BeforeValidator(_integer)]
TopK = Annotated[int, Field(ge=-1, le=MAX_TOKENS_CEILING), BeforeValidator(_integer)]
Priority = Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY), BeforeValidator(_integer)]
TokenId = Annotated[int, Field(ge=0, le=(1 << 31) - 1), BeforeValidator(_integer)]
Temperature = Annotated[float, Field(ge=0, le=2), BeforeValidator(_number)]
TopP = Annotated[float, Field(gt=0, le=1), BeforeValidator(_number)]
Probability = Annotated[float, Field(ge=0, le=1), BeforeValidator(_number)]
Penalty = Annotated[float, Field(ge=-2, le=2), BeforeValidator(_number)]
RepetitionPenalty = Annotated[float, Field(ge=0.01, le=100), BeforeValidator(_number)]
Bias = Annotated[float, Field(ge=-100, le=100), BeforeValidator(_number)]
LogitBias = Annotated[dict[int, Bias], Field(max_length=MAX_LOGIT_BIAS), BeforeValidator(_biases)]
Text = Annotated[str, AfterValidator(_unicode)]
Name = Annotated[str, Field(max_length=MAX_NAME_LENGTH), AfterValidator(_unicode)]
CacheSalt = Annotated[str, Field(min_length=1, max_length=MAX_SALT_LENGTH), AfterValidator(_unicode)]
OptionalBool = StrictBool | None

# Prompts are long: checked in Rust, without a Python call per token, and so without 16.0 for 16.
TokenIds = Annotated[
    list[Annotated[int, Field(strict=True, ge=0, le=(1 << 31) - 1)]], Field(min_length=1, max_length=MAX_TOKENS_CEILING)
]

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH), AfterValidator(_unicode)]

BadWords = Annotated[list[StopString], Field(max_length=MAX_BAD_WORDS)]

UNION_TAGS = frozenset({"as:text", "as:texts", "as:tokens", "as:token_lists", "as:parts"})
"""Branches of the unions below. pydantic puts them into the place of an error, from where they are taken out."""


def _prompt_kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "as:text"
    if not isinstance(value, list) or not value:
        return None
    first = value[0]
    if isinstance(first, list):
        return "as:token_lists"
    return "as:texts" if isinstance(first, str) else "as:tokens"


def text_or(list_tag: str) -> Discriminator:
    """Tells a string from a list in a union whose branches are tagged ``as:text`` and ``list_tag``."""

    def kind(value: Any) -> str | None:
        if isinstance(value, str):
            return "as:text"
        return list_tag if isinstance(value, list) else None

    return Discriminator(
        kind, custom_error_type="text_or_list", custom_error_message="Input should be a string or a list"
    )


Prompt = Annotated[
    Annotated[Text, Tag("as:text")]
    | Annotated[list[Text], Field(max_length=MAX_PROMPTS), Tag("as:texts")]
    | Annotated[TokenIds, Tag("as:tokens")]
    | Annotated[list[TokenIds], Field(max_length=MAX_PROMPTS), Tag("as:token_lists")],
    Discriminator(
        _prompt_kind,
        custom_error_type="prompt_type",
        custom_error_message="Input should be a string, a list of strings, token ids or a list of token ids, not empty",
    ),
]

Stop = Annotated[
    Annotated[StopString, Tag("as:text")]
    | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS), Tag("as:texts")],
    text_or("as:texts"),
]


def field_path(location: Iterable[str | int]) -> str | None:
    """pydantic's place of an error as a user writes it: ``messages[0].role``; None for the body itself."""
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step not in UNION_TAGS:
            path += f".{step}" if path else step
    return path or None
