"""Published variants of a model, and what knobs change of them."""

from typing import Any


def override(published: dict[str, Any], **knobs: Any) -> dict[str, Any]:
    """Returns a published variant with those knobs in place of its own that are not 0."""
    return {**published, **{name: value for name, value in knobs.items() if value}}
