"""Options that we know and do not honour yet, and options that we do not know.

House rule: an option we do not honour is refused. The table below says which values change nothing, and those
are accepted, because clients send them unasked. Taking up an option means: delete its line, declare the field.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from kvcache.errors import RequestError

logger = logging.getLogger(__name__)

Neutral = tuple[Any, ...]

_COMMON: dict[str, Neutral] = {
    "length_penalty": (None, 1),
    "use_beam_search": (None, False),
    "response_format": (None, {"type": "text"}),
    "structured_outputs": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "include_stop_str_in_output": (None, False),
    "skip_special_tokens": (None, True),
    "truncate_prompt_tokens": (None,),
}

COMPLETION_NEUTRAL: dict[str, Neutral] = _COMMON | {
    "suffix": (None, ""),
}

CHAT_NEUTRAL: dict[str, Neutral] = _COMMON | {
    "echo": (None, False),
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "parallel_tool_calls": (None, False, True),  # without tools it says nothing
    "functions": (None, []),
    "function_call": (None, "none"),
    "add_generation_prompt": (None, True),
    "continue_final_message": (None, False),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
    "documents": (None, []),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
}

MESSAGE_NEUTRAL: dict[str, Neutral] = {
    "tool_calls": (None, []),
    "function_call": (None,),
    "audio": (None,),
    "refusal": (None, ""),
    "reasoning_content": (None, ""),
}


def refuse_unsupported(extras: Mapping[str, Any], table: Mapping[str, Neutral], prefix: str = "") -> None:
    """Raises for the first of ``extras`` that asks for something in ``table``.

    Raises:
        RequestError: names the field.
    """
    for name, value in extras.items():
        neutral = table.get(name)
        if neutral is not None and not any(_same(value, candidate) for candidate in neutral):
            raise RequestError(f"{prefix}{name} is not supported yet; leave it out", f"{prefix}{name}")


def _same(value: Any, neutral: Any) -> bool:
    """Equal as JSON is: 0 and 0.0 are, 0 and false are not."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


def unsupported_schema(table: Mapping[str, Neutral]) -> dict[str, Any]:
    """The same table for OpenAPI: each option with the only values it may have."""
    return {
        name: {"enum": list(neutral), "description": "Not supported yet: only these values, which change nothing."}
        for name, neutral in table.items()
    }


class UnknownFieldLog:
    """Says once per name that a field was ignored. Bounded, because the names come from clients."""

    MAX_NAMES = 256
    MAX_NAME_LENGTH = 64

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def note(self, names: Mapping[str, Any], known: Mapping[str, Neutral], prefix: str = "") -> None:
        """Logs those of ``names`` that are not ``known`` and were not logged before."""
        for name in names:
            shown = prefix + name[: self.MAX_NAME_LENGTH]
            if name in known or shown in self._seen or len(self._seen) >= self.MAX_NAMES:
                continue
            self._seen.add(shown)
            logger.warning("ignored the unknown request field %s", ascii(shown))
