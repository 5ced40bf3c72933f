"""The version that rows of results are of."""

from __future__ import annotations

import subprocess

from benchmarks.result_files import code_version


def test_the_commit_of_a_copy_without_git(monkeypatch):
    monkeypatch.setattr("benchmarks.result_files.shutil.which", lambda name: None)
    monkeypatch.setenv("FASTERASE_COMMIT", "abc1234")
    code_version.cache_clear()
    assert code_version().endswith(" abc1234")
    code_version.cache_clear()


def test_new_results_do_not_make_the_version_dirty(tmp_path, monkeypatch):
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    result, code = tmp_path / "benchmarks/results/some.csv", tmp_path / "benchmarks/some.py"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for file in (result, code):
        file.write_text("before")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr("benchmarks.result_files.__file__", str(code))
    found = []
    for file in (None, result, code):
        if file:
            file.write_text("after")
        code_version.cache_clear()
        found.append(code_version())
    code_version.cache_clear()
    assert found == [found[0], found[0], f"{found[0]}-dirty"]
