"""The command lines: output, refused arguments, files left behind, and resuming after a kill."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fsspec import filesystem
from webdataset import TarWriter

from bigdssm.dataset.dataset import Dataset
from bigdssm.ingest.dataset_writer import DatasetWriter
from tests.command_line import tool

ROOT = Path(__file__).parents[3]


def test_webdataset_shards_from_the_command_line(tiny_pairs: Any, tmp_path: Path, capsys: Any) -> None:
    lines = (tiny_pairs.source / "pairs.jsonl").read_bytes().splitlines()
    with TarWriter(str(tmp_path / "a=b.tar")) as writer:
        for number, line in enumerate(lines):
            writer.write({"__key__": f"{number:06d}", "json": line})
    pairs = pairs_command(tiny_pairs, tmp_path / "pairs")
    shards = ["webdataset", *pairs[1:3], f"--shards={tmp_path / 'a=b.tar'}", "--out", str(tmp_path / "shards")]
    assert tool("make_shards").main(pairs) == tool("make_shards").main(shards) == 0
    first, second = (line for line in capsys.readouterr().out.splitlines() if "partition base" in line)
    assert first.split(": ")[1] == second.split(": ")[1]
    assert Dataset.open(tmp_path / "pairs").fingerprint == Dataset.open(tmp_path / "shards").fingerprint


def test_a_url_may_have_an_equals_sign_and_a_local_folder_is_a_path(
    tiny_pairs: Any, tmp_path: Path, capsys: Any
) -> None:
    main, source = tool("make_shards").main, (tiny_pairs.source / "pairs.jsonl").read_bytes()
    filesystem("memory").pipe("/day=1/pairs.jsonl", source)
    try:
        command = pairs_command(tiny_pairs, tmp_path / "pairs")
        assert main([*command[:4], "memory://day=1/pairs.jsonl", "run.seed=1", *command[5:]]) == 0
    finally:
        filesystem("memory").rm("/day=1", recursive=True)
    assert Dataset.open(tmp_path / "pairs").num_rows("train") > 0
    assert main(pairs_command(tiny_pairs, Path("unused"), f"--out=file://{tmp_path}/new")) == 2
    assert "a folder of this machine has a path" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def pairs_command(tiny: Any, out: Path, *more: str) -> list[str]:
    return [
        "pairs",
        "--config",
        str(tiny.config),
        "--pairs",
        str(tiny.source / "pairs.jsonl"),
        "--out",
        str(out),
        *more,
    ]


def test_interactions_from_the_command_line(tiny_interactions: Any, tmp_path: Path, capsys: Any) -> None:
    main, source = tool("make_shards").main, tiny_interactions.source
    tables = [f"--{name}={source / name}.csv" for name in ("interactions", "items", "users")]
    command = ["interactions", "--config", str(tiny_interactions.config), f"data.dir={tmp_path / 'out'}", *tables]
    assert main(command) == 0
    assert Dataset.open(tmp_path / "out").fingerprint == Dataset.open(tiny_interactions.dir).fingerprint
    said = capsys.readouterr().out
    assert "60 validation, 60 test rows" in said and "40 documents" in said and "rows/s" in said
    assert main(command) == 3
    assert "error: " in (said := capsys.readouterr().err) and "use --overwrite" in said
    assert (
        main([*command, "--item-column", "itm_id"]) == 3
        and main([*command, "--overwrite", "--time-column", "time"]) == 3
    )
    assert "has no column 'time', which --time-column names; did you mean 'timestamp'?" in capsys.readouterr().err
    assert Dataset.open(tmp_path / "out").num_rows("test") == 60, "a failed --overwrite leaves what was there"
    assert main([*command, "--overwrite", "--seed", "1"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"], "nothing is left beside it"


def test_pairs_from_the_command_line(tiny_pairs: Any, tmp_path: Path, capsys: Any) -> None:
    main = tool("make_shards").main
    assert main(pairs_command(tiny_pairs, tmp_path / "out", "--doc-id-column", "doc_key", "data.lanes=2")) == 0
    assert Dataset.open(tmp_path / "out").catalogue.keys([0])[0].startswith("d")
    assert main(pairs_command(tiny_pairs, tmp_path / "o2", "data.lanse=2")) == 2
    assert "lanse" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(pairs_command(tiny_pairs, tmp_path / "o2", "--no-such-option"))
    assert caught.value.code == 2 and not (tmp_path / "o2").exists()


def test_missing_input_files_are_named(tiny_pairs: Any, tmp_path: Path, capsys: Any) -> None:
    main = tool("make_shards").main
    command = pairs_command(tiny_pairs, tmp_path / "out")
    assert main([*command, "--like", str(tmp_path / "no")]) == 3
    assert main(["no.jsonl" if word.endswith("pairs.jsonl") else word for word in command]) == 3
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "no/schema.json does not exist" in said[0]
    assert said[1] == "error: table no.jsonl does not exist" and not list(tmp_path.iterdir())


def test_a_folder_that_is_no_dataset_is_left_alone(tiny_pairs: Any, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    assert tool("make_shards").main(pairs_command(tiny_pairs, tmp_path / "mine", "--overwrite")) == 3
    assert "holds no dataset; choose another --out" in capsys.readouterr().err
    assert (tmp_path / "mine/thesis.txt").exists()


def test_a_killed_run_leaves_no_dataset_and_the_next_one_clears_up(tiny_pairs: Any, tmp_path: Path) -> None:
    code = (
        "import sys, time, runpy, bigdssm.ingest.job as m\n"
        "m.Ingestion.finish = lambda *args: time.sleep(60);"
        f"sys.argv = {['make_shards', *pairs_command(tiny_pairs, tmp_path / 'out')]!r};"
        f"runpy.run_path({str(ROOT / 'tools/make_shards.py')!r}, run_name='__main__')"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)})
    staging = tmp_path / ".out.unfinished"
    try:
        while not list(staging.glob("partitions/base/*.tar")):
            assert process.poll() is None
            time.sleep(0.05)
        main = tool("make_shards").main
        assert main(pairs_command(tiny_pairs, tmp_path / "out")) == 3, "two at once: the second is refused"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert staging.exists() and not (tmp_path / "out").exists()
    assert main(pairs_command(tiny_pairs, tmp_path / "out")) == 0
    assert Dataset.open(tmp_path / "out").num_rows("train") and not staging.exists()


@pytest.mark.parametrize("after", ["schema.json", "dataset.json"])
def test_an_append_killed_at_any_rename_can_be_repeated(
    tiny_pairs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    main, out = tool("make_shards").main, tmp_path / "out"
    assert main(pairs_command(tiny_pairs, out)) == 0
    new = tmp_path / "new.jsonl"
    new.write_text('{"query": "amber", "text": "amber glass", "section": "new", "tags": ["t9"], "size": 3}\n' * 3)
    append = ["pairs", "--config", str(tiny_pairs.config), "--pairs", str(new), "--out", str(out), "--split", "train"]
    replace = os.replace

    def killed(source: Any, target: Any) -> None:
        if Path(target).name == after and Path(target).parent == out:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        patch.setattr(DatasetWriter, "__exit__", lambda self, *error: self._locks.close())
        assert main([*append, "--append", "day2"]) == 130
    assert main([*append, "--append", "day2"]) == 0
    dataset = Dataset.open(out)
    assert [p.name for p in dataset.partitions] == ["base", "day2"]
    assert list(dataset.schema.doc["section"].vocabulary)[-1] == "new"
    assert not (out / ".unfinished").exists()
