"""The configurations that come with ckptd."""

from pathlib import Path

import pytest

from ckptd import cli, origins

CONFIGS = sorted(Path("configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_preset_is_a_valid_configuration(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As `ckpt config check` sees it: no error, and nothing odd."""
    assert cli.main(["config", "check", str(path)]) == 0
    said = capsys.readouterr()
    assert said.out == f"valid: {path}\n"
    assert "odd" not in said.err


def test_there_is_one_for_each_kind_of_machine() -> None:
    assert {path.stem for path in CONFIGS} >= {"ckptd", "laptop", "training-node", "shared-node", "sweep"}
    readme = Path("README.md").read_text()
    assert [path.name for path in CONFIGS if f"configs/{path.name}" not in readme] == []


@pytest.mark.parametrize("name", ["laptop", "training-node", "shared-node", "sweep"])
def test_a_preset_deletes_only_by_rules_that_it_states(name: str) -> None:
    settings = origins.load(Path(f"configs/{name}.toml"), {}).settings
    assert settings.retention.keeps
    assert settings.retention.keep_best
    assert settings.disk.free_bytes_min > 0
