"""Checks argument and return types while tests run; as in mypy, an int will do where a float is asked."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
