"""Valid files changed at random: refused by an error of ours, or read whole, and never anything else."""

from pathlib import Path

import pytest
from bounds import bounded
from hostile_readers import QUANTIZED, Victim, read_texts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SETTINGS = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=["folder", "gguf", *QUANTIZED])
def victim(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Victim:
    return Victim(request.param, tmp_path_factory.mktemp("victim"))


def mutated(content: bytes, data: st.DataObject) -> bytes:
    """Content with some bytes changed, cut out, put twice, or a number in it made enormous."""
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        begin = data.draw(st.integers(0, len(changed)))
        end = min(len(changed), begin + data.draw(st.sampled_from([0, 1, 4, 8, 100])))
        instead = data.draw(
            st.one_of(
                st.binary(max_size=8),
                st.just(bytes(changed[begin:end]) * 2),
                st.sampled_from(
                    [b"\xff" * 8, b"\0" * 8, b"9" * 12, b"-1", b"null", b"[", b"{", b'"', b"1e999", b"NaN"]
                ),
            )
        )
        changed[begin:end] = instead
    return bytes(changed)


def test_what_is_not_changed_is_read(victim: Victim) -> None:
    assert all(victim.read_with(part, victim.content(part)) for part in victim.parts)


@SETTINGS
@given(data=st.data())
def test_a_changed_file_of_a_model(victim: Victim, data: st.DataObject) -> None:
    part = data.draw(st.sampled_from(victim.parts))
    content = mutated(victim.content(part), data)
    with bounded():
        victim.read_with(part, content)


LINES = (
    b'{"text": "the man"}\n{"prompt": "a", "completion": "b"}\n{"messages": [{"role": "assistant", "content": ""}]}\n'
)


@SETTINGS
@given(data=st.data())
def test_changed_text(tmp_path: Path, data: st.DataObject) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_bytes(mutated(LINES, data))
    with bounded():
        read_texts(file)
