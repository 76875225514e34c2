"""`superglobal download` from a local server of the toy images in archives like the official ones."""

from __future__ import annotations

import hashlib
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from file_server import address, pack, serve, toy_files, wait_for

from superglobal.data.distractors import load_distractors
from superglobal.data.download_links import GROUPS, SOURCE_NAMES, SOURCES, select_sources
from superglobal.data.evaluation_set import require_images
from superglobal.data.gldv2 import read_train, recognition_set, retrieval_set
from superglobal.data.prepare_gldv2 import prepare
from superglobal.data.revisited import revisited_set
from superglobal.download import overview
from superglobal.download.fetch import DownloadOptions, part_path
from superglobal.download.sources import download_google_drive, download_source
from superglobal.errors import InputError
from superglobal.models.weights import read_weights

ROOT = Path(__file__).parents[1]
OXFORD = SOURCES["roxford5k"]
ARCHIVE = OXFORD.archives[0]
ARCHIVE_ADDRESS, MIRROR_ADDRESS = (address(url) for url in ARCHIVE.urls)
CHUNK = 1 << 16


@pytest.fixture(scope="module")
def toy(toy_data) -> Path:
    """Return the folder of the toy set."""
    return toy_data / "toy"


@pytest.fixture
def server(toy):
    """Serve the Oxford archives with the images of the toy set."""
    with serve(toy_files("roxford5k", toy)) as server:
        yield server


def command(*arguments: str) -> list[str]:
    """Return the command line of `superglobal download`."""
    return [sys.executable, "-m", "superglobal", "download", *arguments]


def files_below(folder: Path) -> dict[str, bytes]:
    """Return the contents of all files below a folder by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", ["roxford5k", "rparis6k"])
def test_revisited_sets_are_downloaded_and_load(name, toy, tmp_path):
    with serve(toy_files(name, toy)) as server:
        summary = download_source(SOURCES[name], tmp_path, server.options())
        before = dict(server.requests)
        again = download_source(SOURCES[name], tmp_path, server.options())
    dataset = revisited_set(tmp_path, name)
    require_images([("queries", dataset.queries, ""), ("database", dataset.database, "")])
    assert files_below(tmp_path / name / "jpg") == files_below(toy / "toy" / "jpg")
    assert ("skipped 20 files that are known to be corrupt" in summary) == (name == "rparis6k")
    assert dict(server.requests) == before  # nothing was requested again
    assert again.startswith(f"{len(dataset.queries) + len(dataset.database)} of ")
    assert not [path for path in (tmp_path / name).rglob("*") if path.suffix in (".tgz", ".part", ".json", ".lock")]


def test_distractors_are_downloaded_and_load(toy, tmp_path):
    with serve(toy_files("revisitop1m", toy)) as server:
        download_source(SOURCES["revisitop1m"], tmp_path, server.options(jobs=8))
    require_images([("distractors", load_distractors(tmp_path, "revisitop1m"), "")])
    assert files_below(tmp_path / "revisitop1m" / "jpg") == files_below(toy / "toy_distractors" / "jpg")


def test_gldv2_is_downloaded_and_loads(toy, tmp_path):
    """Download all sources of GLDv2, with the first eight archives of each."""
    sources = [replace(source, archives=source.archives[:8]) for source in select_sources(["gldv2"])]
    assert [source.name for source in sources] == list(GROUPS["gldv2"])
    with serve({}) as server:
        for source in sources:
            files = toy_files(source.name, toy)
            images = sorted((toy / "gldv2" / source.image_folder).rglob("*.jpg")) if source.archives else []
            for number, archive in enumerate(source.archives):
                members = [(str(i.relative_to(i.parents[3])), i.read_bytes()) for i in images[number::8]]
                data = files[address(archive.urls[0])] = pack(members, compressed=False)
                files[address(archive.md5_url)] = hashlib.md5(data).hexdigest().encode()
            server.files |= files
            download_source(source, tmp_path, server.options(jobs=8))
    root = tmp_path / "gldv2"
    for dataset in (retrieval_set(root), recognition_set(root)):
        require_images([("queries", dataset.queries, ""), ("database", dataset.database, "")])
    for split in ("index", "test", "train"):
        assert files_below(root / split) == files_below(toy / "gldv2" / split)
    assert re.fullmatch(r"[0-9a-f]{32}  images_007\.tar\n", (root / "archives/train/images_007.tar.md5").read_text())


def test_packed_downloads_of_gldv2_can_be_used_for_training(toy, tmp_path):
    source = SOURCES["gldv2-train"]
    source = replace(source, archives=source.archives[:3])
    with serve(toy_files("gldv2-train", toy)) as server:
        summary = download_source(source, tmp_path, server.options(packed=True))
        before = sum(server.served.values())
        download_source(source, tmp_path, server.options(packed=True))
        assert sum(server.served.values()) == before
    tars = tmp_path / "gldv2" / "archives" / "train"
    assert f"data.tars={tars}" in summary
    assert not (tmp_path / "gldv2" / "train").exists()
    prepared = prepare(tmp_path / "gldv2", tars=tars, workers=1)
    assert not prepared.tar_problems
    assert len(prepared.corrupt) < prepared.n_images  # images of the other 497 archives are missing
    assert read_train(tmp_path / "gldv2", tars=tars).source is not None
    with pytest.raises(InputError, match="--packed: roxford5k"):
        download_source(OXFORD, tmp_path, server.options(packed=True))


def test_features_are_downloaded_and_checked(toy, tmp_path):
    source = SOURCES["revisited-features"]
    gnd = (toy / "toy" / "gnd_toy.pkl").read_bytes()
    last = source.files[-1]
    target = tmp_path / source.folder / last.path
    recorded = target.with_name(f"{target.name}.sha256")
    with serve({address(f.urls[0]): gnd if f.path.endswith(".pkl") else b"MATLAB 5.0" for f in source.files}) as server:
        download_source(source, tmp_path, server.options())
        assert recorded.read_text() == f"{hashlib.sha256(b'MATLAB 5.0').hexdigest()}  {target.name}\n"
        target.write_bytes(b"something else")
        with pytest.raises(InputError, match="has changed: its sha256 is"):
            download_source(source, tmp_path, server.options())
        target.unlink()
        recorded.unlink()
        server.files[address(last.urls[0])] = b"<!DOCTYPE html><title>Sign in</title>"
        with pytest.raises(InputError, match=r"returned the wrong file, which was removed: .* is a web page"):
            download_source(source, tmp_path, server.options())
        assert not target.exists()


def test_weights_are_downloaded_from_a_mirror_and_checked(tmp_path):
    source = SOURCES["cvnet"]
    blocks = [f"s{s}.b{b}.f.a.weight" for s, n in ((1, 3), (2, 4), (3, 6), (4, 3)) for b in range(1, n + 1)]
    state = {f"encoder_q.{name}": torch.zeros(1) for name in blocks}
    state |= {"encoder_q.stem.conv.weight": torch.zeros(4, 3, 7, 7), "encoder_q.head.fc.weight": torch.zeros(4, 4)}
    torch.save({"model_state": state}, tmp_path / "good")
    with serve({address(file.urls[0]): (tmp_path / "good").read_bytes() for file in source.files}) as server:
        download_source(source, tmp_path, server.options())
        assert read_weights(tmp_path / "cvnet" / "CVPR2022_CVNet_R50.pyth").kind == "cvnet"
        (tmp_path / "cvnet" / "CVPR2022_CVNet_R101.pyth").write_bytes(b"saved by hand, and damaged")
        (tmp_path / "cvnet" / "CVPR2022_CVNet_R101.pyth.sha256").unlink()
        with pytest.raises(InputError, match=r"CVPR2022_CVNet_R101\.pyth"):
            download_source(source, tmp_path, server.options())


def test_the_next_mirror_is_used_if_the_first_lacks_a_file(server, tmp_path):
    server.files[MIRROR_ADDRESS] = server.files.pop(ARCHIVE_ADDRESS)
    download_source(OXFORD, tmp_path, server.options())
    require_images([("database", revisited_set(tmp_path, "roxford5k").database, "")])


def test_the_partial_download_of_one_mirror_survives_a_failure_of_the_next(server, tmp_path):
    server.cut[ARCHIVE_ADDRESS] = 2 * CHUNK
    target = tmp_path / "roxford5k" / ARCHIVE.path
    with pytest.raises(InputError) as caught:
        download_source(OXFORD, tmp_path, server.options(tries=1))
    assert all(f"{server.url}/{path}" in str(caught.value) for path in (ARCHIVE_ADDRESS, MIRROR_ADDRESS))
    assert part_path(target).stat().st_size > 0
    download_source(OXFORD, tmp_path, server.options())
    assert server.served[ARCHIVE_ADDRESS] < len(server.files[ARCHIVE_ADDRESS]) + 2 * CHUNK


def test_a_wrong_md5_is_an_error(toy, tmp_path):
    source = SOURCES["gldv2-test"]
    source = replace(source, archives=source.archives[:2])
    with serve(toy_files("gldv2-test", toy)) as server:
        bad = source.archives[0]
        server.files[address(bad.md5_url)] = b"0" * 32 + b"  images_000.tar\n"
        with pytest.raises(InputError) as caught:
            download_source(source, tmp_path, server.options())
        target = tmp_path / "gldv2" / bad.path
        assert re.search(rf"its md5 is [0-9a-f]{{32}}: expected {'0' * 32}", str(caught.value))
        assert "1 of 2 archives failed" in str(caught.value)
        assert not target.exists()
        assert not part_path(target).exists()
        server.files[address(bad.md5_url)] = b"<html>"
        with pytest.raises(InputError, match="expected an MD5"):
            download_source(source, tmp_path, server.options())


def test_an_archive_that_differs_from_the_first_download_is_an_error(server, tmp_path):
    download_source(OXFORD, tmp_path, server.options())
    next((tmp_path / "roxford5k" / "jpg").iterdir()).unlink()
    server.files[ARCHIVE_ADDRESS] = pack([("x.jpg", b"another")])
    with pytest.raises(InputError, match=r"its sha256 is .* \(first download; remove the \.sha256 file"):
        download_source(OXFORD, tmp_path, server.options())


def test_lost_images_are_extracted_again(server, tmp_path):
    download_source(OXFORD, tmp_path, server.options(keep=True))
    jpg = tmp_path / "roxford5k" / "jpg"
    lost, emptied = sorted(jpg.iterdir())[:2]
    lost.unlink()
    emptied.write_bytes(b"")
    before = server.served[ARCHIVE_ADDRESS]
    download_source(OXFORD, tmp_path, server.options())  # from the kept archive
    assert server.served[ARCHIVE_ADDRESS] == before
    assert lost.stat().st_size
    assert emptied.stat().st_size


def test_images_copied_by_the_user_are_not_downloaded_again(server, toy, tmp_path):
    shutil.copytree(toy / "toy" / "jpg", tmp_path / "roxford5k" / "jpg")
    assert "images from another source" in overview(tmp_path)
    download_source(OXFORD, tmp_path, server.options())
    assert ARCHIVE_ADDRESS not in server.requests


def test_a_killed_command_resumes(server, tmp_path):
    """The second command also names a data set that cannot be downloaded; the others are still downloaded."""
    size = len(server.files[ARCHIVE_ADDRESS])
    assert size > 3 * CHUNK
    server.stall[ARCHIVE_ADDRESS] = size - CHUNK // 2
    part = part_path(tmp_path / "roxford5k" / ARCHIVE.path)
    arguments = ["roxford5k", "--data", str(tmp_path), "--base-url", server.url, "--tries", "1"]
    process = subprocess.Popen(command(*arguments))
    try:
        wait_for(lambda: part.is_file() and part.stat().st_size > CHUNK)
        with pytest.raises(InputError, match=rf"another process is downloading to it \(process {process.pid} on"):
            download_source(OXFORD, tmp_path, server.options())
    finally:
        process.kill()
        process.wait()
    server.stall.clear()
    done = subprocess.run(command("rparis6k", *arguments), capture_output=True, text=True)
    assert done.returncode == 2
    assert "gnd_rparis6k.pkl could not be downloaded" in done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(r"^roxford5k: \d+ of \d+ images in ", done.stdout, re.MULTILINE)
    require_images([("database", revisited_set(tmp_path, "roxford5k").database, "")])
    assert server.served[ARCHIVE_ADDRESS] < size + 2 * CHUNK
    assert re.search(r"roxford5k +1, 1\.9 GB +5,063 +1 of 1 files, 1 of 1 archives unpacked", overview(tmp_path))


def test_a_command_killed_during_extraction_does_not_download_again(server, tmp_path):
    """The process receives SIGKILL before it moves the tenth image to its folder."""
    code = (
        "import os, signal, sys\n"
        "import superglobal.cli\n"
        "import superglobal.download.archives as archives\n"
        "class Killer:\n"
        "    moved = 0\n"
        "    def __getattr__(self, name): return getattr(os, name)\n"
        "    def replace(self, *names):\n"
        "        self.moved += 1\n"
        "        os.kill(os.getpid(), signal.SIGKILL) if self.moved == 10 else os.replace(*names)\n"
        "archives.os = Killer()\n"
        "sys.exit(superglobal.cli.main(sys.argv[1:]))\n"
    )
    arguments = [
        sys.executable,
        "-c",
        code,
        *command("roxford5k", "--data", str(tmp_path), "--base-url", server.url)[3:],
    ]
    assert subprocess.run(arguments, capture_output=True).returncode == -signal.SIGKILL
    jpg = tmp_path / "roxford5k" / "jpg"
    assert len([path for path in jpg.iterdir() if path.suffix == ".jpg"]) == 9
    download_source(OXFORD, tmp_path, server.options())
    assert server.requests[ARCHIVE_ADDRESS] == 1
    require_images([("database", revisited_set(tmp_path, "roxford5k").database, "")])
    assert not [path for path in jpg.iterdir() if path.name.startswith(".")]


def test_ctrl_c_ends_the_command_at_once(server, tmp_path):
    server.stall[ARCHIVE_ADDRESS] = 3 * CHUNK
    arguments = command("roxford5k", "--data", str(tmp_path), "--base-url", server.url)
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    part = part_path(tmp_path / "roxford5k" / ARCHIVE.path)
    wait_for(lambda: part.is_file() and part.stat().st_size > CHUNK)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "the same command" in text
    assert "roxford5k: " in text  # the progress bar


@pytest.mark.parametrize("arguments", [["oxford"], [], ["roxford5k", "--jobs", "0"]])
def test_invalid_arguments_print_the_valid_choices(arguments):
    done = subprocess.run(command(*arguments), capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert ("--jobs" if "--jobs" in arguments else "roxford5k, rparis6k") in done.stderr


def test_list_works_without_a_server(tmp_path):
    done = subprocess.run(command("--list", "--data", str(tmp_path)), capture_output=True, text=True)
    assert done.returncode == 0
    assert all(re.search(rf"^{name} ", done.stdout, re.MULTILINE) for name in SOURCE_NAMES)


def test_a_failed_google_drive_download_explains_the_manual_steps(tmp_path, monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(
        InputError, match=r"the weights of CVNet could not be downloaded from Google Drive \(ProxyError"
    ) as caught:
        download_google_drive(SOURCES["cvnet"], tmp_path, DownloadOptions(timeout=2, tries=1))
    for part in (
        "drive.google.com/drive/folders/1gMbZ8JlTyPlH2-6HW5NHRe58LmKfJybx",
        "CVPR2022_CVNet_R101",
        str(tmp_path),
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("message", "name"),
    [
        (lambda root: revisited_set(root, "roxford5k"), "roxford5k"),
        (lambda root: load_distractors(root, "revisitop1m"), "revisitop1m"),
        (lambda root: read_train(root / "gldv2"), "gldv2-train"),
        (lambda root: retrieval_set(root / "gldv2"), "gldv2-index"),
    ],
)
def test_errors_about_missing_data_name_the_download_command(message, name, tmp_path):
    with pytest.raises(InputError, match=f"superglobal download {name} --data {re.escape(str(tmp_path))}"):
        message(tmp_path)
