"""The public names."""

import pkgutil

import logitwise


def test_every_public_name_is_there_and_none_is_that_of_a_module() -> None:
    """A module takes the place of what is called like it as soon as anything imports it."""
    for name in logitwise.__all__:
        assert getattr(logitwise, name).__name__ == name
    assert {module.name for module in pkgutil.iter_modules(logitwise.__path__)}.isdisjoint(logitwise.__all__)
