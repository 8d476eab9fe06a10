# ---- events
import math
import os
import pathlib
import signal
import struct
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest

import data

HEADER = b"#!AER-DAT2.0\r\n# This is a raw AE data file - do not edit\r\n# Timestamps tick: 1 us\r\n"
RECORDINGS = sorted(pathlib.Path(os.environ.get("DVS_RECORDINGS", "/nowhere")).glob("*.aedat"))


def slow_read(path):
    """An AEDAT 2.0 recording one event at a time: lists t, x, y, p. Written from the format's description alone."""
    raw, at = pathlib.Path(path).read_bytes(), 0
    while raw[at:at + 1] == b"#":
        at = raw.index(b"\n", at) + 1
    t, x, y, p, clock, last = [], [], [], [], 0, None
    while at < len(raw):
        address, stamp = struct.unpack(">II", raw[at:at + 8])
        if last is not None and last - stamp > 2 ** 31:
            clock += 2 ** 32
        last, at = stamp, at + 8
        t.append(clock + stamp)
        x.append(127 - address // 256 % 128)
        y.append(127 - address // 2 % 128)
        p.append(0 if address % 2 else 1)
    return t, x, y, p


def slow_bin(t, x, y, p, frames, height, width, by):
    out = np.zeros((frames, 2, height, width), np.int64)
    share, first, length = len(t) // frames, min(t), max((max(t) - min(t)) // frames, 1)
    for i in range(len(t)):
        if by == "time":
            slot = (t[i] - first) // length
        else:
            slot = i // share if share else frames - 1
        out[min(slot, frames - 1), p[i], y[i], x[i]] += 1
    return out


def pack(addresses, times, header=HEADER):
    return header + b"".join(struct.pack(">II", int(a), int(t) % 2 ** 32) for a, t in zip(addresses, times))


def made_recording(seed, n=2000):
    rng = np.random.default_rng(seed)
    return pack(rng.integers(0, 2 ** 15, n), np.sort(rng.integers(0, 10 ** 6, n)))


def made_set(folder, per_class, classes=tuple(data.CIFAR10), n=300):
    for c in classes:
        (folder / c).mkdir(parents=True)
        for i in range(per_class):
            (folder / c / f"cifar10_{c}_{i}.aedat").write_bytes(made_recording((len(c), ord(c[0]), i), n))


CLOCKS = {
    "rising": np.sort(np.random.default_rng(0).integers(0, 10 ** 6, 997)),
    "gaps": np.r_[np.arange(500), 10 ** 6 + np.arange(497)],                          # empty slices in between
    "equal": np.full(997, 5),
    "wraps": 2 ** 32 - 500 + 2 * np.arange(997),
    "short": np.arange(997) // 200,                                                  # less time than slices
    "few": np.array([7, 9, 9]),                                                      # fewer events than slices
    "back": np.r_[np.arange(1000, 1500), np.arange(900, 1397)],                      # a clock that was set back
}


@pytest.mark.parametrize("case", [*CLOCKS, *map(str, RECORDINGS)])
def test_events_and_frames_equal_a_slow_reader_and_binner(case, tmp_path):
    path = pathlib.Path(case)
    if case in CLOCKS:
        path = tmp_path / "made.aedat"
        path.write_bytes(pack(np.random.default_rng(1).integers(0, 2 ** 15, len(CLOCKS[case])), CLOCKS[case]))
    expected, found = slow_read(path), data.read_aedat(path)
    assert found[0].dtype == np.int64
    for a, b in zip(expected, found):
        assert np.array_equal(a, b)
    for by in ("count", "time"):
        for frames in (1, 4, 10):
            result = data.bin_events(*found, frames=frames, height=128, width=128, by=by)
            assert result.dtype == np.uint16 and np.array_equal(result, slow_bin(*expected, frames, 128, 128, by))


def test_header_lines_end_where_the_number_sign_does_and_address_bits_are_where_they_belong(tmp_path):
    path = tmp_path / "text.aedat"
    stamps = [int.from_bytes(b"#abc"), int.from_bytes(b"\n#hi"), int.from_bytes(b"x\r\n#")]
    path.write_bytes(pack([0x410A, 0x2323, 0x0A23], stamps))                          # bytes of events that look like text
    t, x, y, p = data.read_aedat(path)
    assert t.tolist() == [stamps[0], *(stamps[0] + s - stamps[0] for s in stamps[1:])]
    assert (x.tolist(), y.tolist(), p.tolist()) == ([62, 92, 117], [122, 110, 110], [1, 0, 0])
    path.write_bytes(pack([0, 1, 2, 0xFE, 0x100, 0x7F00], range(6)))
    t, x, y, p = data.read_aedat(path)
    assert x.tolist() == [127, 127, 127, 127, 126, 0] and y.tolist() == [127, 127, 126, 0, 127, 127] and p.tolist() == [1, 0, 1, 1, 1, 1]


def test_reading_gives_back_what_was_written(tmp_path):
    rng = np.random.default_rng(2)
    events = np.sort(rng.integers(0, 9999, 500)), *(rng.integers(0, high, 500) for high in (128, 128, 2))
    data.write_aedat(tmp_path / "a.aedat", *events)
    assert all(np.array_equal(a, b) for a, b in zip(events, data.read_aedat(tmp_path / "a.aedat")))


def test_bin_events_saturates_and_refuses_what_lies_outside():
    many = np.zeros(70000, np.int64)
    assert data.bin_events(many, many, many, many, 1, 2, 2)[0, 0, 0, 0] == 65535
    assert not data.bin_events(many[:0], many[:0], many[:0], many[:0], 3, 2, 2, "time").any()
    one, two = np.array([1]), np.array([2])
    for events in ((one, two, one, one), (one, one, two, one), (one, one, one, two), (one, -one, one, one)):
        with pytest.raises(ValueError, match="outside"):
            data.bin_events(*events, 1, 2, 2)
    for frames, by in ((0, "count"), (1, "number")):
        with pytest.raises(ValueError):
            data.bin_events(one, one, one, one, frames, 2, 2, by)


def test_nmnist_events_equal_a_slow_reader(tmp_path):
    raw = np.random.default_rng(3).integers(0, 256, (400, 5))
    raw[:, :2] %= 34
    (tmp_path / "1.bin").write_bytes(raw.astype(np.uint8).tobytes())
    t, x, y, p = data.read_nmnist(tmp_path / "1.bin")
    for i, (a, b, c, d, e) in enumerate(raw.tolist()):
        assert (t[i], x[i], y[i], p[i]) == ((c % 128 * 256 + d) * 256 + e, a, b, c // 128)


@pytest.mark.parametrize("n, size", [(128, 48), (128, 32), (34, 34), (5, 3)])
def test_area_mean_equals_splitting_every_pixel(n, size):
    frames, cuts = np.random.default_rng(4).integers(0, 60, (3, 2, n, n)), size // math.gcd(n, size)
    fine = frames.repeat(cuts, 2).repeat(cuts, 3)                # areas are whole numbers of such parts
    expected = fine.reshape(3, 2, size, n * cuts // size, size, n * cuts // size).mean((3, 5))
    assert np.allclose(data.area_mean(frames, size), expected, atol=1e-4)


BAD = {"empty": b"", "header only": HEADER, "unfinished header": HEADER + b"# no end", "truncated": made_recording(0)[:-3],
       "zip": b"PK\x03\x04" + bytes(60), "not aedat": b"RIFF" + bytes(60), "AEDAT 3": b"#!AER-DAT3.1\r\n" + bytes(80),
       "address": pack([5, 0x8000], [1, 2]), "absurd": None}


@pytest.mark.parametrize("fault", BAD)
def test_bad_recordings_give_one_line_with_the_name(fault, tmp_path):
    path = tmp_path / "bad one.aedat"
    path.write_bytes(BAD[fault] or b"")
    if fault == "absurd":
        path.write_bytes(HEADER)
        os.truncate(path, 2 ** 34 + 8000)                        # takes no room on the disk
    with pytest.raises(data.UserError) as caught:
        data.read_aedat(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and "replace" in str(caught.value)


@pytest.mark.parametrize("raw", [b"", bytes(7), bytes([34, 0, 0, 0, 0]), bytes([0, 34, 0, 0, 0]), b"PK\x03\x04\x05"])
def test_bad_nmnist_recordings_give_one_line_with_the_name(raw, tmp_path):
    (tmp_path / "1.bin").write_bytes(raw)
    with pytest.raises(data.UserError, match="1.bin.*replace"):
        data.read_nmnist(tmp_path / "1.bin")


def zip_classes(folder, out):
    out.mkdir(parents=True)
    for c in data.CIFAR10:
        with zipfile.ZipFile(out / f"{c}.zip", "w", zipfile.ZIP_DEFLATED) as z:
            z.writestr(f"{c}/", "")
            z.writestr(f"__MACOSX/{c}/._cifar10_{c}_0.aedat", "no recording")
            for path in (folder / c).iterdir():
                z.write(path, f"{c}/{path.name}")


def test_folders_and_zip_files_give_the_same_arrays(tmp_path):
    made_set(tmp_path / "a/cifar10-dvs", 3)
    for c in data.CIFAR10:
        (tmp_path / f"a/cifar10-dvs/{c}/cifar10_{c}_2.aedat").rename(tmp_path / f"a/cifar10-dvs/{c}/cifar10_{c}_100.aedat")
    zip_classes(tmp_path / "a/cifar10-dvs", tmp_path / "b/cifar10-dvs")
    a, b = (data.load("cifar10-dvs", tmp_path / x, timesteps=4, workers=w) for x, w in (("a", 0), ("b", 1)))
    assert a.split == "first100" and a.classes == data.CIFAR10 and a.frames == 4 and a.size == (48, 48)
    assert a.sets["train"][1].tolist() == list(range(10)) and len(a.sets["test"][1]) == 20
    for split in ("train", "test"):
        assert all(u.equal(v) for u, v in zip(a.sets[split], b.sets[split]))
    frames = data.bin_events(*data.read_aedat(tmp_path / "a/cifar10-dvs/cat/cifar10_cat_100.aedat"), 4, 128, 128)
    expected = frames.repeat(3, 2).repeat(3, 3).reshape(4, 2, 48, 8, 48, 8).mean((3, 5))
    x = next(b.test(20))[0]
    assert x.shape == (20, 4, 2, 48, 48) and x.max() < 16
    seen = b.sets["train"][0][3].permute(2, 0, 1).reshape(4, 2, 48, 48) / 16.0       # in events per pixel
    assert abs(seen.numpy() - expected).max() <= 0.5 / 16 + 1e-6
    names = sorted(p.name for p in (tmp_path / "a/cifar10-dvs").glob("*.npy"))
    assert names == [f"{s}_{k}_T4_count_48_first100.npy" for s in ("test", "train") for k in ("images", "labels")]
    assert not list((tmp_path / "a/cifar10-dvs").glob(".parts*"))
    data.load("cifar10-dvs", tmp_path / "a", timesteps=2, bin_by="time", dvs_split="random", workers=0)
    assert (tmp_path / "a/cifar10-dvs/test_images_T2_time_48_random.npy").exists()


def test_splits():
    recordings = [(label, i, f"{label}_{i}", 0) for label in range(10) for i in range(1000)]
    number, label = np.tile(np.arange(1000), 10), np.arange(10).repeat(1000)
    first, drawn, again = (data.test_part(recordings, s) for s in ("first100", "random", "random"))
    assert np.array_equal(first, number < 100)
    assert np.array_equal(drawn, again) and not np.array_equal(drawn, first)
    assert np.bincount(label[drawn]).tolist() == [100] * 10 and len({tuple(number[drawn & (label == c)]) for c in range(10)}) == 10
    recordings = [(7, 1, f"n/{part}/7/1.bin", 0) for part in ("Train", "Test")]
    assert data.test_part(recordings, "official").tolist() == [False, True]


@pytest.mark.parametrize("fault, text", [("none", "cifar10-dvs has no.*figshare"), ("class", "no recordings of class horse"),
                                         ("file", "cat_1.aedat ends in the middle"), ("zip", "horse.zip is no readable zip"),
                                         ("member", "horse.zip/horse/.*cannot be read"), ("split", "first100 makes 20 of 20")])
def test_what_is_wrong_with_a_data_set_is_said_before_work_begins(fault, text, tmp_path, monkeypatch):
    folder = tmp_path / "cifar10-dvs"
    if fault != "none":
        made_set(folder, 2)
    if fault == "file":
        os.truncate(folder / "cat/cifar10_cat_1.aedat", 500)
    if fault in ("class", "zip", "member"):
        for path in (folder / "horse").iterdir():
            path.unlink()
        (folder / "horse").rmdir()
    if fault == "zip":
        (folder / "horse.zip").write_bytes(b"<html>not found</html>")
    if fault == "member":
        with zipfile.ZipFile(folder / "horse.zip", "w") as z:
            z.writestr("horse/cifar10_horse_0.aedat", made_recording(0))
        raw = bytearray((folder / "horse.zip").read_bytes())
        raw[:4] = bytes(4)                                       # where the member should begin
        (folder / "horse.zip").write_bytes(raw)
    monkeypatch.setattr(data, "make_frames", lambda *a, **k: pytest.fail("work began"))
    with pytest.raises(data.UserError, match=text) as caught:
        data.load("cifar10-dvs", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_damaged_zip_member_is_no_recording(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        z.writestr("a/1.aedat", made_recording(0, 9000))
    assert len(data.read_aedat(tmp_path / "a.zip/a/1.aedat")[0]) == 9000
    raw = bytearray((tmp_path / "a.zip").read_bytes())
    raw[50000] ^= 1
    (tmp_path / "b.zip").write_bytes(raw)
    with pytest.raises(data.UserError, match="b.zip/a/1.aedat cannot be read.*CRC"):
        data.read_aedat(tmp_path / "b.zip/a/1.aedat")


def test_missing_nmnist_says_where_to_get_it(tmp_path):
    with pytest.raises(data.UserError, match="Train.zip.*garrickorchard"):
        data.load("nmnist", tmp_path)


def test_an_error_of_a_worker_process_is_one_line(tmp_path):
    made_set(tmp_path / "cifar10-dvs", 2)
    (tmp_path / "cifar10-dvs/dog/cifar10_dog_1.aedat").write_bytes(pack([5, 0x12345], [1, 2]))        # seen only when read
    with pytest.raises(data.UserError, match=r"^[^\n]*dog_1.aedat holds the address 0x12345[^\n]*$"):
        data.load("cifar10-dvs", tmp_path, dvs_split="random", workers=2)


def test_a_killed_preparation_leaves_no_half_array_and_goes_on(tmp_path, monkeypatch):
    made_set(tmp_path / "cifar10-dvs", 20)                                            # 200 recordings: 8 parts
    script = ("import time, data; slow = data.bin_events\n"
              "data.bin_events = lambda *a: (time.sleep(0.02), slow(*a))[1]\n"
              f"data.load('cifar10-dvs', {str(tmp_path)!r}, timesteps=2, dvs_split='random', workers=1)")
    folder = tmp_path / "cifar10-dvs"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=pathlib.Path(data.__file__).parent)
    deadline = time.monotonic() + 60
    while len(list(folder.glob(".parts*/*.npy"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not list(folder.glob("*.npy"))
    done = [np.load(path, allow_pickle=False) for path in folder.glob(".parts*/*.npy")]              # all of them whole
    assert 3 <= len(done) < 8 and all(part.shape == (25, 2, 2, 48, 48) for part in done)
    calls, bin_events = [], data.bin_events
    monkeypatch.setattr(data, "bin_events", lambda *a: calls.append(1) or bin_events(*a))
    resumed = data.load("cifar10-dvs", tmp_path, timesteps=2, dvs_split="random", workers=0)
    assert len(calls) <= 200 - 25 * len(done)                    # the orphaned worker may have finished one more
    for path in folder.glob("*.npy"):
        path.unlink()
    fresh = data.load("cifar10-dvs", tmp_path, timesteps=2, dvs_split="random", workers=0)
    for split in ("train", "test"):
        assert all(u.equal(v) for u, v in zip(resumed.sets[split], fresh.sets[split]))


def test_drawn_recordings_are_a_set_like_any_other(tmp_path):
    data.draw_recordings(tmp_path, per_class=1)
    (tmp_path / "ring/drawn_ring_0.aedat").unlink()
    data.draw_recordings(tmp_path, per_class=1)                  # adds what is missing
    found = data.find_recordings("shapes-dvs", tmp_path, data.SHAPES)
    assert [(label, number) for label, number, _, _ in found] == [(label, 0) for label in range(10)]
    for _, _, path, _ in found:
        t, x, y, p = data.read_aedat(path)
        assert len(t) > 1000 and (np.diff(t) >= 0).all() and 0.3 < p.mean() < 0.7


def test_shifts_are_the_same_for_all_frames_of_a_recording_and_digits_are_not_mirrored():
    images = np.zeros((40, 3, 2, 34, 34), np.uint8)
    images[:, :, :, 17, 10] = 1
    labels = np.zeros(40, np.int64)
    found = set()
    x, _ = next(data.Resident("nmnist", (images, labels), (images, labels), ["0"], (0.0, 0.0), (1 / 255,) * 2, pad=5, flip=False).train(40, 0, 0))
    for recording in x:
        places = recording.nonzero()
        assert len(places) == 6 and len({tuple(place[2:].tolist()) for place in places}) == 1
        found.add(tuple(places[0, 2:].tolist()))
    assert {abs(r - 17) <= 5 and abs(c - 10) <= 5 for r, c in found} == {True} and len(found) > 10
