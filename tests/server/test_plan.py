"""`steadystate plan`: its table, its JSON, and the command lines that make no sense."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from server.cli import main
from tests.model.test_plan import MINIMAX
from tests.server.hub_server import Repo, serve_hub


@pytest.fixture(scope="module")
def minimax(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.json, and nothing else."""
    path = tmp_path_factory.mktemp("minimax")
    (path / "config.json").write_text(json.dumps(MINIMAX))
    return path


def test_the_table(minimax: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(minimax), "--gpu", "h200", "--gpus", "8", "--ring", "0"]) == 0
    text = capsys.readouterr().out
    for expected in (
        *("MiniMaxForCausalLM, 80 layers, on 8 x h200", "912.2 GB", "114 GB a GPU", "in int8"),
        *("293.6 MB", "40.96 kB", "327.7 kB", "more from 1,024 tokens on", "--max-running 256"),
        *("1,048,576", "43.24 GB", "343.6 GB", "4,194,304", "serve itself takes one GPU"),
    ):
        assert expected in text


def test_what_does_not_fit_is_said(minimax: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(minimax / "config.json"), "--quantization", "fp8"]
    assert main(arguments) == 0
    assert "Not one sequence fits on 1 x h200; 4 would do." in capsys.readouterr().out
    assert main([*arguments, "--gpu", "0.1", "--gpus", "8"]) == 0
    assert "nor on any number of them" in capsys.readouterr().out


def test_json_of_one_context(minimax: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--context", "131072", "--concurrency", "3", "--dtype", "bfloat16"]
    flags += ["--ring", "0", "--json"]
    assert main(["plan", str(minimax), "--gpus", "8", "--gpu", "141GB", *flags]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["gpu_bytes"] == 141_000_000_000 and made["fits"] and made["max_running"] == 3
    (row,) = made["rows"]
    assert row["context"] == 131_072 and row["bytes"] == 293_601_280 + 131_072 * 40_960
    assert row["full_bytes"] == 131_072 * 327_680 and row["sequences"] > row["full_sequences"] > 0
    assert made["footprint"]["weights"]["int8"] < 0.51 * made["footprint"]["weights"]["none"]


def test_the_bundled_model_grows_with_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "recall", "--gpu", "l4"]) == 0
    text = capsys.readouterr().out
    assert "256 slots; all of them at once of any length" in text and "\nKV" not in text


@pytest.mark.parametrize(
    ("flags", "code", "mistake"),
    [
        (["--gpu", "abacus"], 2, "'abacus'"),
        (["--gpu", "nan"], 2, "'nan'"),
        (["--gpus", "0"], 2, "from 1"),
        (["--gpus", "x"], 2, "--gpus"),
        (["--context", "20000000"], 2, "10240000 positions"),
        (["--memory-fraction", "2"], 2, "memory_fraction"),
        (["--quantization", "int3"], 2, "int3"),
    ],
)
def test_command_lines_that_make_no_sense(
    minimax: Path, capsys: pytest.CaptureFixture[str], flags: list[str], code: int, mistake: str
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["plan", str(minimax), *flags])
    assert end.value.code == code and mistake in capsys.readouterr().err


def test_a_model_that_is_not_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert main(["plan", str(tmp_path)]) == 1
    assert "'LlamaForCausalLM' is not served" in capsys.readouterr().err
    (tmp_path / "config.json").unlink()
    assert main(["plan", str(tmp_path)]) == 1
    assert "no config.json" in capsys.readouterr().err


def test_a_model_on_the_hub_costs_its_config_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"config.json": json.dumps(MINIMAX).encode(), "model.safetensors": b"", "a.py": b""}
    with serve_hub(org_mini=Repo(files)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        command = [sys.executable, "-m", "server", "plan", "org/mini", "--revision"]
        made = subprocess.run([*command, "main"], capture_output=True, text=True)
        missing = subprocess.run([*command, "v9"], capture_output=True, text=True)
    assert made.returncode == 0 and "912.2 GB" in made.stdout
    assert missing.returncode == 1 and "'org/mini' at revision 'v9'" in missing.stderr
    assert {path.rpartition("/")[2] for path in hub.paths() if "/resolve/" in path} == {
        "config.json"
    }
