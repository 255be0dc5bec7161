"""Models are named apart."""

from helpers import MemorySource, tiny_model

from logitwise.comparison.candidates import names


def test_names_that_are_shared_become_what_was_given() -> None:
    sources = [MemorySource(tiny_model("llama")) for _ in range(4)]
    for source, name in zip(sources, ("full", "w4", "w4", "w3"), strict=True):
        source.name = name
    assert names(["full", "a/w4", "b/w4", "w3"], sources) == ["full", "a/w4", "b/w4", "w3"]
    assert names(["full", "a/w4", "a/w4", "w3"], sources) == ["full", "a/w4 (2)", "a/w4 (3)", "w3"]
