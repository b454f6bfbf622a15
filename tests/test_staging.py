"""What nettrim writes: whole or not at all, wherever it is killed; and never in the place of an input or of somebody else's file."""

from __future__ import annotations

import copy
import os
import re
import signal
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import nettrim
from nettrim import InvalidInput, PruneResult, checkpoint, render, staging
from nettrim.capture import hashes

forked = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.scandir", "os.listdir", "fcntl.flock")


def killed(step: int, work: Callable[[], object]) -> int:
    """Runs ``work`` in a child that is killed before its ``step``-th call of the system; -1 lets it end. How many calls there were."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        count = [0]

        def hook(event: str, _: object) -> None:
            if event in EVENTS:
                if count[0] == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                count[0] += 1

        try:
            sys.addaudithook(hook)
            work()
            os.write(writing, str(count[0]).encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as told:
        return int(told.read() or 0)


def write(folder: Path, text: str) -> None:
    with staging.writing(folder, ["a.json", "b.json"], "bench") as hidden:
        for name in ("a.json", "b.json"):
            (hidden / name).write_text('{"producer": "nettrim", "kind": "bench", "is": "' + text + '"}')
        (hidden / "scratch").write_text("not to be moved")


def held(folder: Path) -> set[str]:
    """The texts of the two files; nothing else may be there, hidden or not, but what is somebody else's."""
    found = {staging.find(folder, name).read_text() if staging.find(folder, name).exists() else "" for name in ("a.json", "b.json")}
    assert {path.name for path in folder.iterdir()} <= {"a.json", "b.json", "mine.txt"}
    return found


@forked
@pytest.mark.parametrize("earlier", [False, True])
def test_killed_anywhere_it_is_wholly_the_old_or_wholly_the_new(tmp_path: Path, earlier: bool) -> None:
    def fresh(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "mine.txt").write_text("kept")
        if earlier:
            write(folder, "old")
        return folder

    whole = fresh("all")
    steps = killed(-1, lambda: write(whole, "new"))
    assert steps > 20
    seen = set()
    for step in range(steps):
        folder = fresh(str(step))
        assert killed(step, lambda at=folder: write(at, "new")) == 0  # type: ignore[misc]
        found = held(folder)
        assert len(found) == 1
        seen |= found
        assert (folder / "mine.txt").read_text() == "kept"
        write(folder, "after")
        assert all("after" in text for text in held(folder)) and len(held(folder)) == 1
    assert any("new" in text for text in seen) and any("old" in text if earlier else not text for text in seen)


@pytest.fixture(scope="module")
def results() -> tuple[nn.Sequential, torch.Tensor, list[PruneResult]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 3)).eval()
    x = torch.randn(50, 8)
    return net, x, [nettrim.prune(net, [x], nettrim.Magnitude(sparsity=share), progress=False) for share in (0.2, 0.5)]


@forked
@pytest.mark.parametrize("earlier", [False, True])
def test_a_saved_result_is_never_a_mixture(
    results: tuple[nn.Sequential, torch.Tensor, list[PruneResult]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool
) -> None:
    net, x, (old, new) = results
    wanted = {result.certificate.weights_hash for result in (old, new)}
    page = (old.save(tmp_path / "page") / checkpoint.PAGE).read_text()
    bare = re.sub(r'<meta name="nettrim-file"[^>]*>', "", page)

    def drawn_once(*_: object, files: dict[str, str], **__: object) -> str:
        """What is tested is how files are written, and that the page is that of the files."""
        return bare.replace("<head>", "<head>" + "".join(f'<meta name="nettrim-file" content="{name} {files[name]}">' for name in files))

    monkeypatch.setattr(render, "report_html", drawn_once)

    def fresh(name: str) -> Path:
        return old.save(tmp_path / name) if earlier else tmp_path / name

    whole = fresh("all")
    steps = killed(-1, lambda: new.save(whole))
    for step in range(0, steps, 3):
        folder = fresh(f"{step}")
        killed(step, lambda at=folder: new.save(at))  # type: ignore[misc]
        try:
            found = {hashes(nettrim.load(folder, copy.deepcopy(net))), checkpoint.read_certificate(folder).weights_hash}
        except InvalidInput:
            assert not earlier
            with pytest.raises(InvalidInput):
                checkpoint.read_report(folder)
        else:
            assert len(found) == 1 and found <= wanted
            assert checkpoint.read_report(folder).nonzeros in {old.report.nonzeros, new.report.nonzeros}
        assert not folder.exists() or not [path for path in folder.iterdir() if path.name.startswith(".")]
        nettrim.verify(new.save(folder), net, [x])


def test_what_was_committed_is_read_where_it_cannot_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "old")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(staging, "_forward", refuse)
        with pytest.raises(InvalidInput, match=r"complete in \.nettrim-commit"):
            write(tmp_path, "new")
        assert all("new" in staging.find(tmp_path, name).read_text() for name in ("a.json", "b.json"))
    assert all("new" in text for text in held(tmp_path))


def test_a_file_of_somebody_else_is_not_replaced_by_a_recovery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(staging, "_forward", lambda _: (_ for _ in ()).throw(OSError(5, "broken")))
        with pytest.raises(InvalidInput):
            write(tmp_path, "new")
    (tmp_path / "b.json").write_text("mine")
    with pytest.raises(InvalidInput, match=r"b\.json: an interrupted save is complete .* in its way"):
        staging.settle(tmp_path)
    assert (tmp_path / "b.json").read_text() == "mine"


def test_a_write_under_way_is_left_alone(tmp_path: Path) -> None:
    with staging.writing(tmp_path, ["a.json"], "bench") as hidden:
        (hidden / "a.json").write_text("{}")
        staging.settle(tmp_path)
        assert (hidden / "a.json").exists()
    (tmp_path / ".saving-somebody").mkdir()
    (tmp_path / ".saving-somebody" / "notes").write_text("no lock of ours")
    staging.settle(tmp_path)
    assert (tmp_path / ".saving-somebody" / "notes").exists() and not hidden.exists()


def test_an_interruption_after_the_commit_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.replace, [0]

    def replace(source: Path, target: Path) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt, match=r"a\.json, b\.json are there, whole"):
        write(tmp_path, "new")
    assert all("new" in text for text in held(tmp_path))


def test_inputs_stay_whatever_they_are_called(tmp_path: Path) -> None:
    file = nettrim.save_weights(nn.Linear(2, 2), tmp_path / "model.safetensors")
    (tmp_path / "folder").symlink_to(tmp_path, target_is_directory=True)
    os.link(file, tmp_path / "other.safetensors")
    (tmp_path / "link.safetensors").symlink_to(file)
    for name in (file, tmp_path / "folder" / file.name, tmp_path / "other.safetensors", tmp_path / "link.safetensors"):
        for one, other in ((file, name), (name, file)):
            with pytest.raises(InvalidInput, match="which must stay as it is"):
                staging.check([one], "weights", force=True, inputs=[None, other])
    with pytest.raises(InvalidInput, match="which must stay"):
        staging.check([tmp_path / "new.html"], "page", inputs=[tmp_path / "folder" / "new.html"])
    with pytest.raises(InvalidInput, match="a link stands there"):
        staging.check([tmp_path / "link.safetensors"], "weights", force=True)


def test_only_its_own_are_replaced(tmp_path: Path, results: tuple[nn.Sequential, torch.Tensor, list[PruneResult]]) -> None:
    folder = results[2][0].save(tmp_path / "result")
    files = [folder / name for name in checkpoint.RESULT]
    assert [staging.kind_of(file) for file in files] == ["result", "result", "result", "page"]
    staging.check(files, "result", force=True)
    with pytest.raises(InvalidInput, match=r"an earlier result of nettrim is there; .* --force \(in Python force=True\)"):
        staging.check(files, "result")
    with pytest.raises(InvalidInput, match="no weights, but was written by nettrim as result"):
        nettrim.save_weights(results[0], folder / "model.safetensors")
    save_file(results[0].state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(InvalidInput, match="nettrim did not write it; choose another place, or move it away"):
        results[2][1].save(folder)
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["a.json", "a.html", "a.svg", "a.png", "a.c", "a.h", "a.onnx", "a.pt2", "a.safetensors", "a.txt"])
def test_files_of_others_have_no_mark(tmp_path: Path, name: str) -> None:
    for content in (b"", b"nettrim", b"PK\x03\x04nettrim", b'{"kind": "bench"}', b"\x00" * 9000):
        (tmp_path / name).write_bytes(content)
        assert staging.kind_of(tmp_path / name) is None
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("a/models/model.json", "{}")
    assert staging.kind_of(tmp_path / name) is None
    assert staging.kind_of(tmp_path / f"missing-{name}") is None


def test_saving_in_the_current_folder_or_through_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, results: tuple[nn.Sequential, torch.Tensor, list[PruneResult]]
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    monkeypatch.chdir(tmp_path / "real")
    results[2][0].save(".")
    results[2][1].save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert checkpoint.read_certificate(".") == results[2][1].certificate
    assert nettrim.save_weights(results[0], "alone.safetensors").is_file()
