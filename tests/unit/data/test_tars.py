import io
import tarfile

import pytest
from tokar.data.tars import TarTruncatedError, group, parse_label, scan, split_name
from tokar.errors import UserError

LONG = "folder/" * 30 + "name-" * 30


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_scan_sees_what_tarfile_sees(tmp_path, format):
    path = tmp_path / "x.tar"
    names = ["a.jpg", "a.cls", "dir/b.png", "d" * 90 + "/" + "e" * 60 + ".png", "empty.txt", "ümlaut.jpg"]
    names += [] if format == tarfile.USTAR_FORMAT else [LONG + ".jpg"]
    with tarfile.open(path, "w", format=format) as tar:
        tar.addfile(_directory("dir"))
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 0 if name == "empty.txt" else 511 + i
            tar.addfile(info, io.BytesIO(bytes([i]) * info.size))
    with tarfile.open(path) as tar:
        expected = [(member.name, member.offset_data, member.size) for member in tar if member.isfile()]
    assert [tuple(member) for member in scan(path)] == expected
    assert len(expected) == len(names)


def _directory(name):
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    return info


def test_a_truncated_tar_is_refused_and_its_whole_members_are_known(tmp_path, make):
    files = [(f"{i}.jpg", bytes(1000)) for i in range(3)]
    path = make.tar(tmp_path / "x.tar", files, truncate=2 * 1536 + 700)
    with pytest.raises(TarTruncatedError, match="truncated inside a member") as caught:
        scan(path)
    assert [member.name for member in caught.value.members] == ["0.jpg", "1.jpg"]
    make.tar(path, files, truncate=2 * 1536)
    with pytest.raises(TarTruncatedError, match="no end marker") as caught:
        scan(path)
    assert len(caught.value.members) == 2


def test_empty_foreign_and_damaged_files_are_refused(tmp_path, make):
    path = tmp_path / "x.tar"
    path.write_bytes(b"")
    with pytest.raises(TarTruncatedError, match="empty"):
        scan(path)
    path.write_bytes(b"\x1f\x8b" + bytes(range(256)) * 4)
    with pytest.raises(UserError, match="not an uncompressed tar"):
        scan(path)
    make.tar(path, [("a.jpg", bytes(100)), ("b.jpg", bytes(100))])
    data = bytearray(path.read_bytes())
    data[1024 + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged at byte 1024"):
        scan(path)
    with pytest.raises(UserError, match="No such file"):
        scan(tmp_path / "missing.tar")


def test_samples_are_grouped_as_webdataset_groups_them(tmp_path, make):
    webdataset = pytest.importorskip("webdataset")
    files = [("a/x.jpg", b"1"), ("a/x.cls", b"3"), ("a.b/y.png", b"2"), ("a.b/y.json", b'{"label": 7}'), ("z.seg.png", b"5")]
    path = make.tar(tmp_path / "x.tar", [*files, ("z.JPG", b"6"), ("z.txt", b"a dog")])
    samples = group(scan(path), path)
    assert [sample.key for sample in samples] == ["a/x", "a.b/y", "z"]
    assert [sample["__key__"] for sample in webdataset.WebDataset(str(path), shardshuffle=False)] == ["a/x", "a.b/y", "z"]
    assert [sample.label for sample in samples] == ["3", "7", None]
    assert [sample.image.name for sample in samples] == ["a/x.jpg", "a.b/y.png", "z.JPG"]


def test_a_repeated_member_begins_a_new_sample(tmp_path, make):
    path = make.tar(tmp_path / "x.tar", [("a.jpg", b"1"), ("a.jpg", b"2"), (".hidden", b"3")])
    assert [sample.key for sample in group(scan(path), path)] == ["a", "a"]


def test_names_are_cut_at_the_first_dot_of_the_last_part():
    assert split_name("v1.0/img.a.JPG") == ("v1.0/img", "a.jpg")


@pytest.mark.parametrize(
    ("text", "classes", "label"),
    [
        ("3", [], 3),
        ("1", ["a", "b"], 1),
        ("2", ["a", "b"], None),
        ("b", ["a", "b"], 1),
        ("-1", [], None),
        ("cat", [], None),
        (None, [], None),
        ("1", ["1", "0"], 1),
        ("²", [], None),
    ],
)
def test_labels_are_numbers_or_known_names(text, classes, label):
    assert parse_label(text, classes) == label
