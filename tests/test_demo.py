"""The demo at toy size: the whole command, on a tiny model in place of the real one."""

from pathlib import Path

import pytest
from source_files import decided_model, llama_config, save

from logitwise import cli, demo


@pytest.fixture
def printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What `logitwise demo` prints in a terminal of 80 columns."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "max_position_embeddings": 512}
    model = decided_model(llama_config(**sizes))
    save(model, tmp_path / "tiny")
    monkeypatch.setattr(demo, "smollm2", lambda: tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.argv", ["logitwise", "demo", "here"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    told = capsys.readouterr()
    assert stopped.value.code == 0, told.err
    return told.out


def test_the_demo_ends_with_a_table_an_answer_of_each_and_how_to_load(printed: str) -> None:
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 80
    header = next(line for line in lines if "perplexity" in line and "KL" in line)
    assert header.split() == ["model", "MB", "bits/w", "bits/p", "perplexity", "KL", "top-1"]
    for name in ("original", "RTN", "MSE", "LFQ"):
        row = next(line.split() for line in lines if line.split()[:1] == [name])
        assert len(row) == 7
        assert any(line.strip().startswith(f"{name}: ") for line in lines)
    assert "KL of MSE less that of LFQ, row by row" in printed
    assert demo.PROMPT in printed
    assert 'from_pretrained("here/lfq")' in printed
    assert all((Path("here") / name / "model.safetensors").is_file() for name in ("rtn", "mse", "lfq"))
