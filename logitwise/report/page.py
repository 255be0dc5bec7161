"""The page of a comparison."""

from typing import Any

from logitwise import pages


def page_of(findings: dict[str, Any]) -> str:
    """The page of a comparison's findings."""
    names = " and ".join(model["name"] for model in findings["models"] if not model["original"])
    title = f"{names} beside {findings['models'][0]['name']}"
    return pages.page_of("logitwise compare", title, findings["sentences"], findings, "compare.js")
