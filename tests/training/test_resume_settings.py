"""A run resumed with other settings: refused and untouched, or continued with a line that names them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lcl_mcore.checkpoint.store import MANIFEST, manifest_bytes, parse_manifest
from lcl_mcore.config.run_folder import read_config
from lcl_mcore.evaluation.load import locate
from lcl_mcore.metrics import read_steps

pytestmark = pytest.mark.timeout(200)
Arguments = Callable[..., list[str]]
Tool = Callable[..., Any]


@pytest.fixture(scope="module")
def finished(arguments: Arguments, run_tool: Tool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    out: Path = tmp_path_factory.mktemp("settings") / "run"
    done = run_tool(*arguments(out, "--steps", "2"))
    assert done.returncode == 0, done.stderr
    return out


def content(folder: Path) -> dict[str, str]:
    """Hash of every file, and every folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


def run_cases(run_tool: Tool, file: Path, cases: list[list[str]]) -> list[dict[str, Any]]:
    file.write_text(json.dumps(cases))
    done = run_tool("tests/training/tool_worker.py", str(file), timeout=180)
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return results


def test_what_would_be_another_run_is_refused_and_changes_nothing(
    finished: Path, corpus: Path, arguments: Arguments, run_tool: Tool, tmp_path: Path
) -> None:
    """Heads and activation leave all shapes as they are; seed and data are refused by the saved position."""
    other = "error: OUT/checkpoints/step-00000002: of another model or objective, and no other checkpoint can be used: "
    remedy = ". Resume with the former values, or start a new run from its weights (--out, --init-from).\n"
    expected = {
        ("model.vision.heads=8", "model.language.activation=gelu"): (
            f"{other}model.vision.heads 4 -> 8, model.language.activation relu -> gelu{remedy}"
        ),
        ("model.language.dropout=0.2",): f"{other}model.language.dropout 0.1 -> 0.2{remedy}",
        ("model.language.layers=3",): f"{other}model.language.layers 2 -> 3{remedy}",
        ("--contrastive-weight", "0.5", "--mask-same-document"): (
            f"{other}loss.contrastive_weight 1.0 -> 0.5, loss.mask_same_document False -> True{remedy}"
        ),
        ("--seed", "9", "--lr", "0.5"): (
            "error: saved data position: was made with other data or settings: seed was 0, is 9. Resume with the "
            "former ones, or start a new run (weights can be kept, the order cannot).\n"
        ),
        ("--evaluation.every", "1", "--evaluation.data", str(tmp_path / "nowhere")): None,
        ("--tokenizer", str(tmp_path / "nowhere")): None,
    }
    folders = [tmp_path / str(number) for number in range(len(expected))]
    for out in folders:
        shutil.copytree(finished, out)
        (out / "checkpoints" / "step-00000009.partial").mkdir()  # of a killed save
    before = content(folders[0])
    cases = [arguments(out, "--steps", "4", "--resume", *words) for out, words in zip(folders, expected, strict=True)]
    results = run_cases(run_tool, tmp_path / "cases.json", cases)
    for out, (words, message), result in zip(folders, expected.items(), results, strict=True):
        assert result["code"] == 2, (words, result["stdout"])
        assert result["stderr"].replace(str(out), "OUT") == message or (
            message is None and str(tmp_path / "nowhere") in result["stderr"]
        ), words
        assert content(out) == before, words


def test_other_settings_are_named_in_one_line(
    finished: Path, arguments: Arguments, run_tool: Tool, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    same, useless, longer, shorter = run_cases(
        run_tool,
        tmp_path / "cases.json",
        [
            arguments(out, "--steps", "2", "--resume"),
            arguments(out, "--steps", "2", "--resume", "--lr", "0.5"),
            arguments(out, "--steps", "3", "--resume", "--lr", "0.5", "--generation-impl", "reference"),
            arguments(out, "--steps", "1", "--resume"),
        ],
    )
    assert {result["code"] for result in (same, useless, longer, shorter)} == {0}
    nothing = "nothing to train: 2 steps are done, --steps is 2; with more --steps the run goes on\n"
    assert nothing in same["stdout"]
    assert "were not used" not in same["stdout"]
    assert "settings that were others until then" not in same["stdout"]
    assert f"{nothing}these settings are new and were not used: optim.lr 0.001 -> 0.5\n" in useless["stdout"]
    changed = "optim.lr 0.001 -> 0.5, train.steps 2 -> 3"
    assert (
        f"resume: settings that were others until then: loss.generation_impl auto -> reference, {changed}\n"
    ) in longer["stdout"]
    assert "nothing to train: 3 steps are done, --steps is 1;" in shorter["stdout"]
    written = read_config(out / "config.yaml")
    assert (written.optim.lr, written.train.steps) == (0.5, 3)  # of the resume that trained, not of the last one


def test_starting_over_keeps_what_was_there(
    finished: Path, arguments: Arguments, run_tool: Tool, tmp_path: Path
) -> None:
    """The former run's files have other names and the same content; the new run is one from step 0."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "former-metrics.jsonl").write_text("of a run before that\n")
    before = content(out)
    both, plain, over, resumed = run_cases(
        run_tool,
        tmp_path / "cases.json",
        [
            arguments(out, "--steps", "3", "--resume", "--start-over"),
            arguments(out, "--steps", "3"),
            arguments(out, "--steps", "3", "--start-over", "--seed", "9"),
            arguments(out, "--steps", "3", "--resume", "--seed", "9"),
        ],
    )
    assert (both["code"], both["stderr"]) == (2, "error: --resume: goes on, and --start-over does not. Drop one.\n")
    refusal = "already holds the checkpoints of a run. Add --resume to continue it, or --start-over, or choose another"
    assert (plain["code"], plain["stderr"]) == (2, f"error: {out}: {refusal} --out.\n")
    assert (over["code"], resumed["code"]) == (0, 0), over["stderr"]
    assert f"start over: checkpoints in {out}/checkpoints are now named former-...\n" in over["stdout"]
    assert "nothing to train: 3 steps are done" in resumed["stdout"]
    after = content(out)
    new_names = {"metrics.jsonl": "former-metrics.jsonl.1", "events.jsonl": "former-events.jsonl"}
    for name, digest in before.items():
        aside = new_names.get(name, name.replace("checkpoints/step-", "checkpoints/former-step-"))
        if not name.startswith(("config.yaml", "checkpoints/run-id", "lease", "checkpoints/lease")):
            assert after[aside] == digest, name
    assert [record["step"] for record in read_steps(out / "metrics.jsonl")] == [1, 2, 3]
    names = sorted(path.name for path in (out / "checkpoints").glob("*step-*"))
    assert names == ["former-step-00000002", "step-00000003"]
    former, new = (parse_manifest((out / "checkpoints" / name / MANIFEST).read_bytes()).run for name in names)
    assert former != new


def test_a_model_is_read_with_its_checkpoints_own_configuration(finished: Path, tmp_path: Path) -> None:
    """Whatever the run's `config.yaml` says; checkpoints without a copy say that they use it."""
    from lcl_mcore.checkpoint.consolidate import consolidate, info
    from lcl_mcore.checkpoint.store import written_config

    out = tmp_path / "run"
    shutil.copytree(finished, out)
    true = read_config(out / "config.yaml")
    tree = yaml.safe_load((out / "config.yaml").read_text())
    tree["recipe"], tree["model"]["vision"]["heads"] = "paper-l14", 8
    (out / "config.yaml").write_text(yaml.safe_dump(tree))
    folder, weights = locate(out)
    assert folder == out
    lines: list[str] = []
    assert written_config(weights, lines.append) == true
    assert info(str(out))["recipe"] == "demo"
    consolidate(str(out), tmp_path / "weights")
    assert read_config(tmp_path / "weights" / "config.yaml") == true
    assert lines == []

    manifest = parse_manifest((weights / MANIFEST).read_bytes())
    del manifest.files["config.yaml"]
    (weights / MANIFEST).write_bytes(manifest_bytes(manifest))
    (weights / "config.yaml").unlink()
    assert written_config(weights, lines.append).recipe == "paper-l14"
    assert lines == [f"{weights} holds no config.yaml: the configuration is taken from {out / 'config.yaml'}"]
