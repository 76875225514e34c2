"""Data sets by one command, from a local server that has the toy set in the official archives' layout."""

from __future__ import annotations

import gzip
import hashlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from official import Office, key, packed, serving, toy_files

from superglobal.data.catalogue import GROUPS, NAMES, SOURCES, chosen
from superglobal.data.evaluation_set import load_distractors, require_images
from superglobal.data.gldv2 import read_train, recognition_set, retrieval_set
from superglobal.data.prepare_gldv2 import prepare
from superglobal.data.revisited import revisited_set
from superglobal.download.drive import load_folder
from superglobal.download.fetch import Options, get
from superglobal.download.overview import overview
from superglobal.download.space import Load, needed, require_space
from superglobal.download.transfer import Way, fetch, part_of
from superglobal.errors import InputError
from superglobal.models.weights import read_weights

ROOT = Path(__file__).parents[1]
OXFORD = SOURCES["roxford5k"]
ARCHIVE = OXFORD.archives[0]
ARCHIVE_KEY, MIRROR_KEY = (key(url) for url in ARCHIVE.urls)
CHUNK = 1 << 16
FILE = "a.example/file"


@pytest.fixture(scope="module")
def toy(toy_data) -> Path:
    return toy_data / "toy"


@pytest.fixture
def office(toy):
    """Oxford, with the toy set's photos."""
    with serving(toy_files("roxford5k", toy)) as server:
        yield server


@pytest.fixture
def plain():
    """One file of 300,000 bytes."""
    data = np.random.default_rng(0).bytes(300_000)
    with serving({FILE: data}) as server:
        yield server


def options(office: Office, tries: int = 3, timeout: float = 5, **more) -> Options:
    return Options(Way((office.url,), timeout, tries, pause=0.01), **more)


def load(office: Office, target: Path, tries: int = 3, timeout: float = 5, known=None) -> None:
    fetch([f"https://{FILE}"], target, Way((office.url,), timeout, tries, pause=0.01), lambda *_: None, known)


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / "download.py"), *arguments]


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- each set, from nothing to what eval.py reads


@pytest.mark.parametrize("name", ["roxford5k", "rparis6k"])
def test_revisited_sets_arrive_and_load(name, toy, tmp_path):
    with serving(toy_files(name, toy)) as office:
        said = get(SOURCES[name], tmp_path, options(office))
        before = dict(office.requests)
        again = get(SOURCES[name], tmp_path, options(office))
    found = revisited_set(tmp_path, name)
    require_images([("queries", found.queries, ""), ("database", found.database, "")])
    assert files_below(tmp_path / name / "jpg") == files_below(toy / "toy" / "jpg")  # and no corrupt file of Paris
    assert ("20 left out that are known to be no images" in said) == (name == "rparis6k")
    assert dict(office.requests) == before  # nothing was asked for again
    assert again.startswith(f"{len(found.queries) + len(found.database)} of ")
    assert not [path for path in (tmp_path / name).rglob("*") if path.suffix in (".tgz", ".part", ".json", ".lock")]


def test_the_distractors_arrive_and_load(toy, tmp_path):
    with serving(toy_files("revisitop1m", toy)) as office:
        get(SOURCES["revisitop1m"], tmp_path, options(office, jobs=8))
    require_images([("distractors", load_distractors(tmp_path, "revisitop1m"), "")])
    assert files_below(tmp_path / "revisitop1m" / "jpg") == files_below(toy / "toy_distractors" / "jpg")


def test_gldv2_arrives_and_loads(toy, tmp_path):
    """All of its parts, of the 500 training archives the first eight."""
    sources = [replace(source, archives=source.archives[:8]) for source in chosen(["gldv2"])]
    assert [source.name for source in sources] == list(GROUPS["gldv2"])
    with serving({}) as office:
        for source in sources:
            whole = toy_files(source.name, toy)
            kept = [key(archive.urls[0]) for archive in source.archives]
            members = sorted((toy / "gldv2" / source.images).rglob("*.jpg")) if kept else []
            for number, address in enumerate(kept):
                own = [(str(m.relative_to(m.parents[3])), m.read_bytes()) for m in members[number::8]]
                whole[address] = packed(own, compressed=False)
                whole[key(source.archives[number].md5)] = hashlib.md5(whole[address]).hexdigest().encode()
            office.files |= whole
            get(source, tmp_path, options(office, jobs=8))
    root = tmp_path / "gldv2"
    for found in (retrieval_set(root), recognition_set(root)):
        require_images([("queries", found.queries, ""), ("database", found.database, "")])
    for split in ("index", "test", "train"):
        assert files_below(root / split) == files_below(toy / "gldv2" / split)
    assert (root / "archives" / "train" / "images_007.tar.md5").is_file()  # what md5sum -c takes


def test_gldv2_stays_packed_for_training_from_tar_files(toy, tmp_path):
    source = SOURCES["gldv2-train"]
    source = replace(source, archives=source.archives[:3])
    with serving(toy_files("gldv2-train", toy)) as office:
        said = get(source, tmp_path, options(office, packed=True))
        before = sum(office.served.values())
        get(source, tmp_path, options(office, packed=True))
        assert sum(office.served.values()) == before
    tars = tmp_path / "gldv2" / "archives" / "train"
    assert f"data.tars={tars}" in said
    assert not (tmp_path / "gldv2" / "train").exists()
    found = prepare(tmp_path / "gldv2", tars=tars, workers=1)
    assert not found.tars
    assert len(found.bad) < found.photos  # those of the other 497
    assert read_train(tmp_path / "gldv2", tars=tars).source is not None
    with pytest.raises(InputError, match="--packed: roxford5k"):
        get(OXFORD, tmp_path, options(office, packed=True))


def test_features_arrive_and_are_checked(toy, tmp_path):
    source = SOURCES["revisited-features"]
    gnd = (toy / "toy" / "gnd_toy.pkl").read_bytes()
    last = source.files[-1]
    target = tmp_path / source.folder / last.path
    recorded = target.with_name(f"{target.name}.sha256")
    with serving({key(f.urls[0]): gnd if f.path.endswith(".pkl") else b"MATLAB 5.0" for f in source.files}) as office:
        get(source, tmp_path, options(office))
        assert recorded.read_text() == f"{hashlib.sha256(b'MATLAB 5.0').hexdigest()}  {target.name}\n"
        target.write_bytes(b"something else")
        with pytest.raises(InputError, match="was changed since it was loaded: its sha256 is"):
            get(source, tmp_path, options(office))
        target.unlink()
        recorded.unlink()
        office.files[key(last.urls[0])] = b"<!DOCTYPE html><title>Sign in</title>"
        with pytest.raises(InputError, match=r"gave something else, now removed: .* is a web page"):
            get(source, tmp_path, options(office))
        assert not target.exists()


def test_weights_come_from_another_server_and_are_checked(tmp_path):
    source = SOURCES["cvnet"]
    blocks = [f"s{s}.b{b}.f.a.weight" for s, n in ((1, 3), (2, 4), (3, 6), (4, 3)) for b in range(1, n + 1)]
    state = {f"encoder_q.{name}": torch.zeros(1) for name in blocks}
    state |= {"encoder_q.stem.conv.weight": torch.zeros(4, 3, 7, 7), "encoder_q.head.fc.weight": torch.zeros(4, 4)}
    torch.save({"model_state": state}, tmp_path / "good")
    with serving({key(file.urls[0]): (tmp_path / "good").read_bytes() for file in source.files}) as office:
        get(source, tmp_path, options(office))
        assert read_weights(tmp_path / "cvnet" / "CVPR2022_CVNet_R50.pyth").kind == "cvnet"
        (tmp_path / "cvnet" / "CVPR2022_CVNet_R101.pyth").write_bytes(b"by hand, and damaged")
        (tmp_path / "cvnet" / "CVPR2022_CVNet_R101.pyth.sha256").unlink()
        with pytest.raises(InputError, match=r"CVPR2022_CVNet_R101\.pyth"):
            get(source, tmp_path, options(office))


# --- a transfer that breaks off


def test_a_cut_transfer_is_gone_on_with(plain, tmp_path):
    plain.cut[FILE] = 200_000
    load(plain, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == plain.files[FILE]
    assert plain.requests[FILE] == 2
    assert 300_000 <= plain.served[FILE] < 300_000 + CHUNK
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_later_call_goes_on_with_what_is_there(plain, tmp_path):
    plain.cut[FILE] = 200_000
    with pytest.raises(InputError, match=r"file could not be loaded, \d+ bytes of it are there") as caught:
        load(plain, tmp_path / "file", tries=1)
    assert f"{plain.url}/{FILE}" in str(caught.value)
    assert "call again to go on" in str(caught.value)
    assert part_of(tmp_path / "file").stat().st_size > 100_000
    load(plain, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == plain.files[FILE]
    assert plain.served[FILE] < 300_000 + CHUNK


@pytest.mark.parametrize("etags", [True, False], ids=["etag", "length alone"])
def test_a_file_that_changed_meanwhile_is_loaded_anew(plain, tmp_path, etags):
    plain.cut[FILE], plain.etags = 200_000, etags
    with pytest.raises(InputError):
        load(plain, tmp_path / "file", tries=1)
    plain.files[FILE] = np.random.default_rng(1).bytes(300_000 if etags else 310_000)
    load(plain, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == plain.files[FILE]


def test_a_shorter_file_than_the_part_is_loaded_anew(plain, tmp_path):
    plain.cut[FILE], plain.etags = 200_000, False
    with pytest.raises(InputError):
        load(plain, tmp_path / "file", tries=1)
    plain.files[FILE] = b"short"
    load(plain, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"short"


def test_a_server_without_ranges_is_loaded_from_the_beginning(plain, tmp_path):
    plain.cut[FILE], plain.ranges = 200_000, False
    load(plain, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == plain.files[FILE]


def test_a_silent_server_is_given_up_and_gone_on_with(plain, tmp_path):
    plain.stall[FILE] = 200_000
    start = time.monotonic()
    with pytest.raises(InputError, match="the server was silent for longer than --timeout"):
        load(plain, tmp_path / "file", tries=1, timeout=0.3)
    assert time.monotonic() - start < 5
    plain.stall.clear()
    load(plain, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == plain.files[FILE]
    assert plain.served[FILE] < 300_000 + 2 * CHUNK


def test_what_is_not_there_is_said_and_not_asked_for_again(plain, tmp_path):
    plain.status[FILE] = 404
    with pytest.raises(InputError, match=r"a\.example/file: status 404 \(Not Found\), expected 200") as caught:
        load(plain, tmp_path / "file")
    assert "--base-url" in str(caught.value)
    assert plain.requests[FILE] == 1


def test_an_overloaded_server_is_asked_again(plain, tmp_path):
    plain.status[FILE] = 503
    with pytest.raises(InputError, match="status 503"):
        load(plain, tmp_path / "file", tries=3)
    assert plain.requests[FILE] == 3


def test_an_unreachable_server_is_said(tmp_path):
    with pytest.raises(InputError, match=r"http://127\.0\.0\.1:9/a\.example/file: ConnectionError"):
        fetch([f"https://{FILE}"], tmp_path / "file", Way(("http://127.0.0.1:9",), 2, 1), lambda *_: None)


def test_the_next_mirror_serves_what_the_first_has_not(office, tmp_path):
    office.files[MIRROR_KEY] = office.files.pop(ARCHIVE_KEY)
    get(OXFORD, tmp_path, options(office))
    require_images([("database", revisited_set(tmp_path, "roxford5k").database, "")])


def test_an_archive_that_is_called_an_encoding_stays_compressed(office, tmp_path):
    office.encoding = "x-gzip"
    office.files[key(OXFORD.files[0].urls[0])] = gzip.compress(office.files[key(OXFORD.files[0].urls[0])])
    office.cut[ARCHIVE_KEY] = 2 * CHUNK
    get(OXFORD, tmp_path, options(office))
    require_images([("database", revisited_set(tmp_path, "roxford5k").database, "")])


def test_a_lost_mirror_leaves_the_part_of_the_other(office, tmp_path):
    office.cut[ARCHIVE_KEY] = 2 * CHUNK
    target = tmp_path / "roxford5k" / ARCHIVE.path
    with pytest.raises(InputError) as caught:
        get(OXFORD, tmp_path, options(office, tries=1))
    assert all(f"{office.url}/{address}" in str(caught.value) for address in (ARCHIVE_KEY, MIRROR_KEY))
    assert part_of(target).stat().st_size > 0
    get(OXFORD, tmp_path, options(office))
    assert office.served[ARCHIVE_KEY] < len(office.files[ARCHIVE_KEY]) + 2 * CHUNK


def test_proxies_come_from_the_environment(plain, tmp_path, monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", plain.url)
    fetch([f"http://{FILE}"], tmp_path / "file", Way(tries=1), lambda *_: None)
    assert (tmp_path / "file").read_bytes() == plain.files[FILE]


# --- checksums


def test_a_wrong_md5_is_refused(toy, tmp_path):
    source = SOURCES["gldv2-test"]
    source = replace(source, archives=source.archives[:2])
    with serving(toy_files("gldv2-test", toy)) as office:
        bad = source.archives[0]
        office.files[key(bad.md5)] = b"0" * 32 + b"  images_000.tar\n"
        with pytest.raises(InputError) as caught:
            get(source, tmp_path, options(office))
        target = tmp_path / "gldv2" / bad.path
        expected = rf"its md5 is [0-9a-f]{{32}}, expected {'0' * 32} \(published at {re.escape(bad.md5)}"
        assert re.search(expected, str(caught.value))
        assert "1 of 2 archives failed" in str(caught.value)
        assert not target.exists()
        assert not part_of(target).exists()
        office.files[key(bad.md5)] = b"<html>"
        with pytest.raises(InputError, match="is no md5"):
            get(source, tmp_path, options(office))


def test_a_later_file_must_be_the_first_one(office, tmp_path):
    get(OXFORD, tmp_path, options(office))
    photo = next((tmp_path / "roxford5k" / "jpg").iterdir())
    photo.unlink()
    office.files[ARCHIVE_KEY] = packed([("x.jpg", b"another")])
    with pytest.raises(InputError, match=r"its sha256 is .* \(recorded in .*oxbuild_images-v1\.tgz\.sha256"):
        get(OXFORD, tmp_path, options(office))


def test_a_lost_photo_is_loaded_again(office, tmp_path):
    get(OXFORD, tmp_path, options(office, keep=True))
    jpg = tmp_path / "roxford5k" / "jpg"
    lost, emptied = sorted(jpg.iterdir())[:2]
    lost.unlink()
    emptied.write_bytes(b"")
    before = office.served[ARCHIVE_KEY]
    get(OXFORD, tmp_path, options(office))  # from the archive that was kept
    assert office.served[ARCHIVE_KEY] == before
    assert lost.stat().st_size
    assert emptied.stat().st_size


def test_a_set_of_another_origin_is_not_loaded_again(office, toy, tmp_path):
    shutil.copytree(toy / "toy" / "jpg", tmp_path / "roxford5k" / "jpg")
    assert "photos of another origin" in overview(tmp_path)
    get(OXFORD, tmp_path, options(office))
    assert ARCHIVE_KEY not in office.requests


def test_a_length_that_is_no_number_is_none(tmp_path):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "nonsense")
            self.end_headers()
            self.wfile.write(b"whole")

        def log_message(self, *args):
            """Quiet."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/f"
        fetch((url,), tmp_path / "f", Way(timeout=5, tries=1, pause=0), lambda size, length: None)
        server.shutdown()
    assert (tmp_path / "f").read_bytes() == b"whole"


# --- archives that are not what they should be


def header(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.linkname = kind, link
    return found


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (header("../../evil.jpg"), "leads out of it"),
        (header("/tmp/evil.jpg"), "leads out of it"),
        (header("evil.jpg", tarfile.SYMTYPE, "/etc/passwd"), "has a link"),
        (header("evil.jpg", tarfile.LNKTYPE, "../../x"), "has a link"),
        (header("evil.jpg", tarfile.CHRTYPE), "has a device"),
        (header("evil.jpg", tarfile.FIFOTYPE), "has a device, pipe"),
    ],
)
def test_a_hostile_archive_is_refused_whole(office, toy, tmp_path, member, reason):
    photos = [(photo.name, photo.read_bytes()) for photo in (toy / "toy" / "jpg").iterdir()]
    office.files[ARCHIVE_KEY] = packed([*photos, member])
    data = tmp_path / "data"
    with pytest.raises(InputError, match=f"{reason}.*refused, nothing of it was put in place"):
        get(OXFORD, data, options(office))
    assert not list((data / "roxford5k" / "jpg").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_bomb_is_refused(office, tmp_path):
    office.files[ARCHIVE_KEY] = packed([("bomb.jpg", bytes(80 << 20))])
    with pytest.raises(InputError, match="unpacks to more than"):
        get(OXFORD, tmp_path, options(office))
    long = header("x", tarfile.GNUTYPE_LONGNAME)
    long.size = 1 << 40
    office.files[ARCHIVE_KEY] = gzip.compress(long.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    (tmp_path / "roxford5k" / ARCHIVE.path).unlink()
    with pytest.raises(InputError, match="has a header of"):
        get(OXFORD, tmp_path, options(office))


def test_a_header_with_nonsense_for_numbers_is_no_archive(office, tmp_path):
    member = header("all_souls.jpg")
    member.pax_headers = {"GNU.sparse.map": "nonsense", "GNU.sparse.size": "5"}
    office.files[ARCHIVE_KEY] = gzip.compress(member.tobuf(tarfile.PAX_FORMAT) + bytes(10240))
    with pytest.raises(InputError, match=r"no whole archive \(ValueError"):
        get(OXFORD, tmp_path, options(office))


def test_a_name_that_is_no_utf8_is_left_out(office, tmp_path):
    other = header("café.jpg").tobuf(tarfile.GNU_FORMAT, encoding="latin-1")
    # In front of the photos, so that those are read after it.
    office.files[ARCHIVE_KEY] = gzip.compress(other + gzip.decompress(office.files[ARCHIVE_KEY]))
    assert "1 files left out that no list has" in get(OXFORD, tmp_path, options(office))


@pytest.mark.parametrize("data", [b"<!DOCTYPE html><p>moved</p>", b"", "cut"], ids=["page", "empty", "cut"])
def test_what_is_no_archive_is_said(office, tmp_path, data):
    office.files[ARCHIVE_KEY] = office.files[ARCHIVE_KEY][:-2000] if data == "cut" else data
    with pytest.raises(InputError, match=r"no whole archive .* nothing of it was put in place\. Remove it and call"):
        get(OXFORD, tmp_path, options(office))
    assert not list((tmp_path / "roxford5k" / "jpg").iterdir())


def test_photos_that_no_archive_has_are_named(office, toy, tmp_path):
    photos = sorted((toy / "toy" / "jpg").iterdir())
    office.files[ARCHIVE_KEY] = packed([(photo.name, photo.read_bytes()) for photo in photos[1:]])
    with pytest.raises(InputError, match=rf"1 of {len(photos)} photos of the lists are missing:\n.*{photos[0].name}"):
        get(OXFORD, tmp_path, options(office))


# --- room


def test_a_full_disk_is_said_before_anything_is_loaded(office, tmp_path):
    office.claimed[ARCHIVE_KEY] = 2 * shutil.disk_usage(tmp_path).free
    with pytest.raises(InputError, match=r"roxford5k needs .* GB more in .* are free: nothing was loaded"):
        get(OXFORD, tmp_path, options(office))
    assert ARCHIVE_KEY not in office.requests


def test_what_room_is_needed():
    loads = [Load(100, 0), Load(60, 60), Load(40, 10), Load(None, 0)]
    assert needed(loads, jobs=1, keep=False, unpacked=True) == 100 + 210 - 70
    assert needed(loads, jobs=2, keep=False, unpacked=True) == 160 + 210 - 70
    assert needed(loads, jobs=1, keep=True, unpacked=True) == 200 + 210 - 70
    assert needed(loads, jobs=1, keep=False, unpacked=False) == 200 - 70
    require_space(Path("/"), "x", 0)


# --- the command


def test_a_killed_command_goes_on_where_it_was(office, tmp_path):
    """Its second call also asks for a set that cannot be had, which does not keep the next from coming."""
    size = len(office.files[ARCHIVE_KEY])
    assert size > 3 * CHUNK
    office.stall[ARCHIVE_KEY] = size - CHUNK // 2
    part = part_of(tmp_path / "roxford5k" / ARCHIVE.path)
    arguments = ["roxford5k", "--data", str(tmp_path), "--base-url", office.url, "--tries", "1"]
    process = subprocess.Popen(command(*arguments))
    try:
        wait_for(lambda: part.is_file() and part.stat().st_size > CHUNK)
        with pytest.raises(InputError, match=rf"another process is loading into it \(process {process.pid} on"):
            get(OXFORD, tmp_path, options(office))
    finally:
        process.kill()
        process.wait()
    office.stall.clear()
    done = subprocess.run(command("rparis6k", *arguments), capture_output=True, text=True)
    assert done.returncode == 2
    assert "gnd_rparis6k.pkl could not be loaded" in done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(r"^roxford5k: \d+ of \d+ photos in ", done.stdout, re.MULTILINE)
    require_images([("database", revisited_set(tmp_path, "roxford5k").database, "")])
    assert office.served[ARCHIVE_KEY] < size + 2 * CHUNK
    assert re.search(r"roxford5k +1, 1\.9 GB +5,063 +1 of 1 files, 1 of 1 archives unpacked", overview(tmp_path))


def test_killed_while_it_unpacks_it_loads_nothing_again(office, tmp_path):
    """SIGKILL as the tenth photo is about to be moved into its place."""
    code = (
        "import os, runpy, signal, sys\n"
        "import superglobal.data.download.unpack as unpack\n"
        "class Deadly:\n"
        "    moved = 0\n"
        "    def __getattr__(self, name): return getattr(os, name)\n"
        "    def replace(self, *names):\n"
        "        self.moved += 1\n"
        "        os.kill(os.getpid(), signal.SIGKILL) if self.moved == 10 else os.replace(*names)\n"
        "unpack.os = Deadly()\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    arguments = [
        sys.executable,
        "-c",
        code,
        *command("roxford5k", "--data", str(tmp_path), "--base-url", office.url)[1:],
    ]
    assert subprocess.run(arguments, capture_output=True).returncode == -signal.SIGKILL
    jpg = tmp_path / "roxford5k" / "jpg"
    assert len([path for path in jpg.iterdir() if path.suffix == ".jpg"]) == 9
    get(OXFORD, tmp_path, options(office))
    assert office.requests[ARCHIVE_KEY] == 1
    require_images([("database", revisited_set(tmp_path, "roxford5k").database, "")])
    assert not [path for path in jpg.iterdir() if path.name.startswith(".")]


def test_the_command_ends_at_once_on_ctrl_c_and_says_how_far_it_is(office, tmp_path):
    office.stall[ARCHIVE_KEY] = 3 * CHUNK
    arguments = command("roxford5k", "--data", str(tmp_path), "--base-url", office.url)
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    part = part_of(tmp_path / "roxford5k" / ARCHIVE.path)
    wait_for(lambda: part.is_file() and part.stat().st_size > CHUNK)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "the same command goes on where it was" in said
    assert re.search(r"roxford5k: \d+\.\d of \d+\.\d MB", said)


@pytest.mark.parametrize("arguments", [["oxford"], [], ["roxford5k", "--jobs", "0"]])
def test_a_mistake_on_the_command_line_names_the_choices(arguments):
    done = subprocess.run(command(*arguments), capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert ("--jobs" if "--jobs" in arguments else "roxford5k, rparis6k") in done.stderr


def test_the_list_needs_no_server(tmp_path):
    done = subprocess.run(command("--list", "--data", str(tmp_path)), capture_output=True, text=True)
    assert done.returncode == 0
    assert all(re.search(rf"^{name} ", done.stdout, re.MULTILINE) for name in NAMES)


def test_google_drive_out_of_reach_says_what_to_do_by_hand(tmp_path, monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"Google Drive did not give CVNet's weights \(ProxyError") as caught:
        load_folder(SOURCES["cvnet"], tmp_path, Way(timeout=2, tries=1))
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
def test_messages_about_missing_data_name_the_command(message, name, tmp_path):
    with pytest.raises(InputError, match=f"python scripts/download.py {name} --data {re.escape(str(tmp_path))}"):
        message(tmp_path)


def wait_for(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
