"""One run, one folder, one trainer at a time; a resumed run keeps its settings."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from keel.errors import CheckpointError, ConfigError
from keel.run.folder import RunFolder, changed_settings, replace_folder, write_atomic

SETTINGS = {"output": "runs/x", "steps": 3, "seed": 0, "algorithm": {"name": "ppo", "kl_coef": 0.05}}


def begun(path: Path) -> None:
    """A run that has logged one step."""
    folder = RunFolder.open(path, SETTINGS)
    folder.metrics.write_text('{"step": 1}\n')
    folder.close()


def test_open_saves_the_settings(tmp_path: Path):
    folder = RunFolder.open(tmp_path / "a" / "run", SETTINGS)
    assert yaml.safe_load(folder.config.read_text()) == SETTINGS == folder.settings()
    assert list(folder.settings()) == list(SETTINGS)


def test_a_run_is_not_overwritten(tmp_path: Path):
    begun(tmp_path)
    with pytest.raises(ConfigError, match=r"already holds a run -> add --resume, or choose another output"):
        RunFolder.open(tmp_path, SETTINGS)


def test_a_start_that_failed_before_its_first_step_can_be_repeated(tmp_path: Path):
    RunFolder.open(tmp_path, SETTINGS).close()
    folder = RunFolder.open(tmp_path, {**SETTINGS, "seed": 1})
    assert folder.settings()["seed"] == 1


def test_resume_of_nothing_starts_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    RunFolder.open(tmp_path / "new", SETTINGS, resume=True)
    assert capsys.readouterr().err == f"keel: nothing to resume in {tmp_path / 'new'}: starting a new run\n"
    RunFolder.open(tmp_path / "other", SETTINGS)
    assert capsys.readouterr().err == ""


def test_resume_refuses_other_settings_and_names_them(tmp_path: Path):
    begun(tmp_path)
    other = {**SETTINGS, "seed": 7, "algorithm": {"name": "ppo", "kl_coef": 0.1}}
    with pytest.raises(ConfigError, match=r"algorithm.kl_coef was 0.05, is 0.1; seed was 0, is 7") as caught:
        RunFolder.open(tmp_path, other, resume=True)
    assert caught.value.exit_code == 2


def test_resume_may_go_further_and_log_otherwise(tmp_path: Path):
    begun(tmp_path)
    further = {**SETTINGS, "steps": 9, "checkpoint": {"every": 1}, "log": {"rollouts_per_step": 0}}
    assert RunFolder.open(tmp_path, further, resume=True).settings()["steps"] == 9


def test_microbatches_may_change_wherever_they_stand():
    assert changed_settings({"algorithm": {"microbatch_tokens": 1}}, {"algorithm": {"microbatch_tokens": 2}}) == []


def test_two_trainers_cannot_share_a_folder(tmp_path: Path):
    first = RunFolder.open(tmp_path, SETTINGS)
    with pytest.raises(ConfigError, match=r"in use by process \d+ since"):
        RunFolder.open(tmp_path, SETTINGS, resume=True)
    first.close()
    with RunFolder.open(tmp_path, SETTINGS, resume=True):
        pass
    del first
    RunFolder.open(tmp_path, SETTINGS, resume=True)


def test_a_killed_trainer_leaves_no_lock(tmp_path: Path):
    script = (
        f"import os; from keel.run.folder import RunFolder; f = RunFolder.open({str(tmp_path)!r}, {{}}); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    RunFolder.open(tmp_path, SETTINGS)


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match="cannot write here"):
            RunFolder.open(path, SETTINGS)


def test_damaged_settings_stop_a_resume(tmp_path: Path):
    begun(tmp_path)
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(CheckpointError, match="cannot be read"):
        RunFolder.open(tmp_path, SETTINGS, resume=True)


def test_write_atomic_replaces_or_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "deep" / "file.json"
    write_atomic(path, "old")

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(CheckpointError, match=r"file.json: No space left on device"):
        write_atomic(path, "new")
    assert path.read_text() == "old"


@pytest.mark.skipif(sys.platform == "win32", reason="links")
@pytest.mark.parametrize("there", ["a folder", "a file", "a link", "a link to nothing"])
def test_a_result_takes_the_place_of_whatever_is_there(there: str, tmp_path: Path):
    """Of a link its own place, not that of what it leads to."""
    target, other = tmp_path / "model", tmp_path / "other"
    other.mkdir()
    (other / "kept").write_text("theirs")
    for path in (target, target.with_name("model.tmp")):
        if there == "a folder":
            path.mkdir()
        elif there == "a file":
            path.write_text("old")
        else:
            path.symlink_to(other if there == "a link" else tmp_path / "nothing")
    replace_folder(target, lambda folder: folder.joinpath("weights").write_text("new") and None)
    assert [path.name for path in target.iterdir()] == ["weights"]
    assert not target.is_symlink()
    assert (other / "kept").read_text() == "theirs"


def test_a_result_can_be_read_by_whom_this_user_lets_read(tmp_path: Path):
    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_text("weights")
        (folder / "model.safetensors").chmod(0o600)

    before = os.umask(0o022)
    try:
        replace_folder(tmp_path / "model", write)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model" / "model.safetensors").stat().st_mode) == 0o644
