"""Archives that are unsafe, damaged or incomplete, and the disk space that they need."""

from __future__ import annotations

import gzip
import shutil
import tarfile
from pathlib import Path

import pytest
from file_server import address, pack, serve, toy_files

from superglobal.data.download_links import SOURCES
from superglobal.data.evaluation_set import require_images
from superglobal.data.revisited import revisited_set
from superglobal.download.fetch import DownloadOptions
from superglobal.download.sources import download_source, required_space
from superglobal.errors import InputError

OXFORD = SOURCES["roxford5k"]
ARCHIVE = OXFORD.archives[0]
ARCHIVE_ADDRESS = address(ARCHIVE.urls[0])


@pytest.fixture
def server(toy_data):
    """Serve the Oxford archives with the images of the toy set."""
    with serve(toy_files("roxford5k", toy_data / "toy")) as server:
        yield server


@pytest.fixture(scope="module")
def images(toy_data) -> list[Path]:
    """List the images of the toy set."""
    return sorted((toy_data / "toy" / "toy" / "jpg").iterdir())


def header(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    """Return the header of a tar member."""
    header = tarfile.TarInfo(name)
    header.type, header.linkname = kind, link
    return header


def extracted(data: Path) -> list[Path]:
    """List the extracted images."""
    return list((data / "roxford5k" / "jpg").iterdir())


@pytest.mark.parametrize(
    "member",
    [
        header("../../evil.jpg"),
        header("evil.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        header("evil.jpg", tarfile.LNKTYPE, "../../x"),
        header("evil.jpg", tarfile.CHRTYPE),
        header("evil.jpg", tarfile.FIFOTYPE),
    ],
)
def test_an_unsafe_archive_is_rejected_as_a_whole(server, images, tmp_path, member):
    server.files[ARCHIVE_ADDRESS] = pack([*((image.name, image.read_bytes()) for image in images), member])
    data = tmp_path / "data"
    with pytest.raises(InputError, match=r"is unsafe: .*evil\.jpg.*Nothing was extracted"):
        download_source(OXFORD, data, server.options())
    assert not extracted(data)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_only_listed_images_are_extracted(server, images, tmp_path):
    """Unlisted files, absolute names, and links that would lead to another image are skipped."""
    outside = tmp_path / "outside.jpg"
    others = [
        ("unlisted.jpg", b"x"),
        (str(outside), b"x"),
        (f"{images[0].name}/deeper.jpg", b"x"),
        header(images[0].name, tarfile.SYMTYPE, images[1].name),
    ]
    members = [(f"/some/folder/{image.name}", image.read_bytes()) for image in images]
    server.files[ARCHIVE_ADDRESS] = pack([*members, *others])
    summary = download_source(OXFORD, tmp_path / "data", server.options())
    assert "skipped 4 files that are in no list" in summary
    assert {path.name: path.read_bytes() for path in extracted(tmp_path / "data")} == {
        image.name: image.read_bytes() for image in images
    }
    assert not any(path.is_symlink() for path in extracted(tmp_path / "data"))
    assert not outside.exists()


@pytest.mark.parametrize(
    ("kind", "problem"),
    [(tarfile.REGTYPE, "it unpacks to more than"), (tarfile.GNUTYPE_LONGNAME, "it has a header of 83886080 bytes")],
    ids=["file", "header"],
)
def test_an_archive_that_unpacks_to_too_much_is_rejected(server, tmp_path, kind, problem):
    bomb = header("bomb.jpg", kind)
    bomb.size = 80 << 20
    server.files[ARCHIVE_ADDRESS] = gzip.compress(bomb.tobuf(tarfile.GNU_FORMAT) + bytes(bomb.size + 10240), 1)
    with pytest.raises(InputError, match=f"is unsafe: {problem}"):
        download_source(OXFORD, tmp_path, server.options())
    assert not extracted(tmp_path)


def test_a_header_with_invalid_numbers_is_not_an_archive(server, tmp_path):
    member = header("all_souls.jpg")
    member.pax_headers = {"GNU.sparse.map": "nonsense", "GNU.sparse.size": "5"}
    server.files[ARCHIVE_ADDRESS] = gzip.compress(member.tobuf(tarfile.PAX_FORMAT) + bytes(10240))
    with pytest.raises(InputError, match=r"not a complete archive \(ValueError"):
        download_source(OXFORD, tmp_path, server.options())


def test_a_name_that_is_not_utf8_is_skipped(server, tmp_path):
    invalid = header("café.jpg").tobuf(tarfile.GNU_FORMAT, encoding="latin-1")
    # The invalid name comes first, so that the images are read after it.
    server.files[ARCHIVE_ADDRESS] = gzip.compress(invalid + gzip.decompress(server.files[ARCHIVE_ADDRESS]))
    assert "skipped 1 files that are in no list" in download_source(OXFORD, tmp_path, server.options())


@pytest.mark.parametrize("data", [b"<!DOCTYPE html><p>moved</p>", b"", "cut"], ids=["page", "empty", "cut"])
def test_an_incomplete_archive_is_an_error(server, tmp_path, data):
    server.files[ARCHIVE_ADDRESS] = server.files[ARCHIVE_ADDRESS][:-2000] if data == "cut" else data
    with pytest.raises(InputError, match=r"not a complete archive .* Nothing was extracted; remove the file and run"):
        download_source(OXFORD, tmp_path, server.options())
    assert not extracted(tmp_path)


def test_images_missing_from_all_archives_are_listed(server, images, tmp_path):
    server.files[ARCHIVE_ADDRESS] = pack([(image.name, image.read_bytes()) for image in images[1:]])
    missing = rf"1 of {len(images)} listed images are missing:\n.*{images[0].name}"
    with pytest.raises(InputError, match=missing):
        download_source(OXFORD, tmp_path, server.options())


def test_archives_are_stored_compressed_for_any_content_encoding(server, tmp_path):
    ground_truth = address(OXFORD.files[0].urls[0])
    server.encoding = "x-gzip"
    server.files[ground_truth] = gzip.compress(server.files[ground_truth])
    server.cut[ARCHIVE_ADDRESS] = 1 << 17
    download_source(OXFORD, tmp_path, server.options())
    require_images([("database", revisited_set(tmp_path, "roxford5k").database, "")])


def test_insufficient_disk_space_is_an_error_before_the_download(server, tmp_path):
    server.claimed[ARCHIVE_ADDRESS] = 2 * shutil.disk_usage(tmp_path).free
    with pytest.raises(InputError, match=r"roxford5k needs .* GB more in .* are free, so nothing was downloaded"):
        download_source(OXFORD, tmp_path, server.options())
    assert ARCHIVE_ADDRESS not in server.requests


def test_required_space_depends_on_jobs_keep_and_packed():
    sizes, present = [100, 60, 40, None], [0, 60, 10, 0]

    def space(**options) -> int:
        return required_space(sizes, present, DownloadOptions(**options))

    assert space(jobs=1) == 100 + 210 - 70
    assert space(jobs=2) == 160 + 210 - 70
    assert space(jobs=1, keep=True) == 200 + 210 - 70
    assert space(jobs=1, packed=True) == 200 - 70
