"""The tokenizer file of an export: other programs put the token there that our own code puts before every document.

The rest of the file is that of the tokenizer, so reading it back gives the same tokenizer, with the same fingerprint.
"""

import json
from typing import Any


def with_document_start(text: str, token: str, token_id: int) -> str:
    """Return the content of a tokenizer file whose post-processor puts a token before every text.

    Args:
        text: JSON of the `tokenizers` library.
        token: special token with which documents begin.
        token_id: its id.
    """
    content: dict[str, Any] = json.loads(text)
    start, own = _start(token, token_id), content["post_processor"]
    content["post_processor"] = start if own is None else {"type": "Sequence", "processors": [own, start]}
    return json.dumps(content, ensure_ascii=False)


def without_document_start(text: str) -> str:
    """Return the content without what `with_document_start` added; any other content as it is."""
    if '"TemplateProcessing"' not in text:
        return text
    content = json.loads(text)
    found = content["post_processor"]
    if _is_start(found):
        content["post_processor"] = None
    elif found.get("type") == "Sequence" and len(found["processors"]) == 2 and _is_start(found["processors"][1]):
        content["post_processor"] = found["processors"][0]
    else:
        return text
    return json.dumps(content, ensure_ascii=False)


def _start(token: str, token_id: int) -> dict[str, Any]:
    def special(part: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": token, "type_id": part}}

    def sequence(name: str, part: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": part}}

    return {
        "type": "TemplateProcessing",
        "single": [special(0), sequence("A", 0)],
        "pair": [special(0), sequence("A", 0), special(1), sequence("B", 1)],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }


def _is_start(processor: Any) -> bool:
    tokens = processor.get("special_tokens") if isinstance(processor, dict) else None
    if not isinstance(tokens, dict) or len(tokens) != 1:
        return False
    [(token, found)] = tokens.items()
    return bool(processor == _start(token, found["ids"][0]))
