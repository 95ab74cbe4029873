"""Teacher outputs on disk: right, found again by content, shared by processes, proof against stops and damage."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from filelock import FileLock
from torch import nn

from hf_hpmkd import teacher_output_file
from hf_hpmkd.tasks.augmentation import Augmentation
from hf_hpmkd.tasks.base import UNAUGMENTED
from hf_hpmkd.tasks.images import ImageFeed, ImageRows
from hf_hpmkd.teacher_cache import LiveOutputs, TeacherCache, estimate
from hf_hpmkd.teacher_kinds import ColumnTeacher, TorchTeacher
from hf_hpmkd.teacher_output_file import Layout, to_half

NAMES = ["cat", "dog", "emu", "fox"]
K = len(NAMES)


def image_rows(count=50, seed=0, augmentation_seed=3, folder=None):
    """Random 8x8 images. folder: the rows are read back from a file there."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.randint(K, (count,), generator=generator).tolist()
    dataset = Dataset.from_dict({"label": labels})
    if folder is not None:
        dataset.to_parquet(folder / "rows.parquet")
        dataset = Dataset.from_parquet(str(folder / "rows.parquet"), cache_dir=str(folder))
    return ImageRows(dataset, "image", labels, NAMES, Augmentation("crop_flip", 1, None, augmentation_seed), images)


class Tiny(nn.Module):
    def __init__(self, seed=0, scale=1.0, seconds=0.0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.hidden = nn.Linear(3 * 8 * 8, 16)
            self.head = nn.Linear(16, K)
        self.scale = scale
        self.seconds = seconds  # per batch
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        time.sleep(self.seconds)
        return self.head(self.hidden(x.flatten(1)).relu()) * self.scale


def feed(mean=0.5):
    return ImageFeed((8, 8), [mean] * 3, [0.25] * 3)


def teacher(seed=0, name="one", class_names=NAMES, **settings):
    return TorchTeacher(Tiny(seed, **settings), feed(), name=name, data_names=NAMES, class_names=class_names)


def get(cache, teachers, rows, views=0, **settings):
    return cache.outputs(teachers, rows, views, progress=False, **settings)


def everything(outputs, rows, view):
    indices = torch.arange(len(rows))
    return outputs.lookup(indices, torch.full_like(indices, view))


def files(cache):
    return sorted(path for path in cache.root.glob("*.safetensors") if path.name != "model.safetensors")


# ---- what comes out --------------------------------------------------------------------------------------------------


def test_lookup_gives_what_the_teachers_say_in_each_view(tmp_path):
    rows, teachers = image_rows(), [teacher(0), teacher(1, "two", class_names=NAMES[::-1])]
    outputs = get(TeacherCache(tmp_path), teachers, rows, views=3, batch_size=16)
    chosen = torch.randint(50, (40,))
    views = torch.randint(3, (40,))
    found = outputs.lookup(chosen, views)
    assert found.shape == (2, 40, K) and found.dtype == torch.float32
    for m, one in enumerate(teachers):
        # Straight from the definition: augment, feed, model, order of the classes.
        own = one.model(feed()(rows.raw(chosen, views))["pixel_values"])
        expected = own if m == 0 else own.flip(1)
        assert torch.allclose(found[m], expected, atol=2e-3)
    assert not torch.allclose(outputs.lookup(chosen, (views + 1) % 3), found, atol=1e-2)  # views do differ
    assert (outputs.names, outputs.num_teachers, outputs.num_classes) == (["one", "two"], 2, K)
    assert outputs.nbytes == 2 * 3 * 50 * K * 2


def test_unaugmented_rows(tmp_path):
    rows, one = image_rows(), teacher()
    found = everything(get(TeacherCache(tmp_path), [one], rows), rows, UNAUGMENTED)[0]
    assert torch.allclose(found, one.model(feed()(rows.raw(range(50)))["pixel_values"]), atol=2e-3)


def test_resident_outputs_equal_mapped_ones(tmp_path):
    rows, teachers = image_rows(), [teacher(0), teacher(1)]
    for settings in ({}, {"mode": "topk", "topk": 2}):
        outputs = get(TeacherCache(tmp_path), teachers, rows, views=3, **settings)
        chosen, views = torch.randint(50, (64,)), torch.randint(3, (64,))
        mapped = outputs.lookup(chosen, views)
        assert torch.equal(outputs.to("cpu").lookup(chosen, views), mapped)


def test_LiveOutputs_equal_stored_ones(tmp_path):
    rows, teachers = image_rows(), [teacher(0), teacher(1)]
    chosen, views = torch.arange(30), torch.arange(30) % 2
    stored = get(TeacherCache(tmp_path), teachers, rows, views=2).lookup(chosen, views)
    live = LiveOutputs(teachers, rows)
    assert torch.allclose(live.lookup(chosen, views), stored, atol=2e-3)
    logits, features = live.lookup_with_features(chosen, views)
    assert torch.allclose(logits, stored, atol=2e-3) and [f.shape for f in features] == [(30, 16)] * 2
    assert torch.allclose(teachers[1].model.head(features[1]), logits[1], atol=1e-6)
    assert not logits.requires_grad and not features[0].requires_grad


def test_LiveOutputs_take_the_students_inputs_where_the_feed_is_the_same():
    rows, same = image_rows(), teacher(0)
    other = TorchTeacher(Tiny(0), feed(mean=0.1), name="other", data_names=NAMES, class_names=NAMES)
    student_inputs = {"pixel_values": torch.zeros(4, 3, 8, 8)}
    chosen = torch.arange(4)
    found = LiveOutputs([same, other], rows, student_feed=feed()).lookup(chosen, chosen * 0 - 1, student_inputs)
    assert torch.allclose(found[0], same.model(student_inputs["pixel_values"]))
    assert torch.allclose(found[1], other.model(feed(0.1)(rows.raw(chosen))["pixel_values"]))


def test_indices_out_of_range_are_refused(tmp_path):
    outputs = get(TeacherCache(tmp_path), [teacher()], image_rows(), views=2)
    zero = torch.zeros(1, dtype=torch.long)
    with pytest.raises(IndexError, match=r"Rows 0\.\.49 are stored, asked for 50\.\.50"):
        outputs.lookup(zero + 50, zero)
    for view in (2, UNAUGMENTED):
        with pytest.raises(IndexError, match=r"Views 0\.\.1 are stored"):
            outputs.lookup(zero, zero + view)
    with pytest.raises(ValueError, match="One view per row"):
        outputs.lookup(zero, torch.zeros(2, dtype=torch.long))
    assert outputs.lookup(zero[:0], zero[:0]).shape == (1, 0, K)


def test_topk_spreads_the_rest_evenly(tmp_path):
    rows, one = image_rows(), teacher(scale=5.0)
    full = everything(get(TeacherCache(tmp_path), [one], rows), rows, -1)[0].softmax(1)
    outputs = get(TeacherCache(tmp_path), [one], rows, mode="topk", topk=2)
    found = everything(outputs, rows, -1)[0].exp()
    assert torch.allclose(found.sum(1), torch.ones(50), atol=2e-3)
    largest, places = full.topk(2)
    assert torch.allclose(found.gather(1, places), largest, atol=2e-3)
    rest = torch.ones(50, K).scatter(1, places, 0).bool()
    assert torch.allclose(found[rest].view(50, 2), ((1 - largest.sum(1)) / 2)[:, None].expand(50, 2), atol=2e-3)
    assert outputs.nbytes == 50 * (2 * 2 + 2 * 2 + 2)
    assert get(TeacherCache(tmp_path), [one], rows, mode="topk", topk=K).hits == 1  # leaves nothing out: full


def test_topk_of_a_teacher_that_is_sure(tmp_path):
    logits = torch.tensor([[500.0, 0, -3, 1], [0, 1, 2, 3]])
    layout = Layout("topk", 1, 2, K)
    decoded = layout.decode(layout.encode(logits))
    assert torch.isfinite(decoded).all() and decoded.softmax(1)[0, 0] == 1
    with pytest.raises(ValueError, match="`topk` must be at least 1 class, got None"):
        Layout("topk", None, 2, K)
    with pytest.raises(ValueError, match="`mode` must be one of full, topk, got 'half'"):
        Layout("half", None, 2, K)


def test_half_precision_neither_overflows_nor_changes_the_answer():
    logits = torch.tensor([[1e6, 1e6 - 2, -1e6, 0], [1.0, 2, 3, 4], [-torch.inf, 0, 1, 2]])
    half = to_half(logits)
    assert torch.isfinite(half).all()
    assert torch.allclose(half.float().softmax(1), logits.softmax(1), atol=1e-3)
    assert torch.equal(half[1], logits[1].half())  # left as it is
    far = torch.tensor([[-3000.3, -3001.4, -3002.2, -3000.9]])  # log-likelihoods that nobody has normalised
    assert torch.allclose(to_half(far).float().softmax(1), far.softmax(1), atol=1e-3)
    assert to_half(torch.tensor([[torch.nan, 0.0], [torch.inf, 0.0]])).isnan().any(1).all()


def test_nan_stops_the_capture_and_leaves_no_file(tmp_path):
    class Broken(Tiny):
        def forward(self, x):
            outputs = super().forward(x)
            if self.calls == 2:
                outputs[3, 1] = torch.nan
            return outputs

    broken = TorchTeacher(Broken(), feed(), name="broken", data_names=NAMES, class_names=NAMES)
    with pytest.raises(ValueError, match=r"'broken' answers row 19 \(view 0\) with NaN"):
        get(TeacherCache(tmp_path), [broken], image_rows(), views=1, batch_size=16)
    assert not files(TeacherCache(tmp_path))


def test_views_need_an_augmentation_and_teachers_that_can_answer_them(tmp_path):
    plain = image_rows()
    bare = ImageRows(plain.dataset, "image", plain.labels, NAMES, None, plain.images)
    with pytest.raises(ValueError, match="these rows have no augmentation. Use num_views=0"):
        get(TeacherCache(tmp_path), [teacher()], bare, views=2)
    logits = torch.randn(50, K).tolist()
    rows = ImageRows(
        plain.dataset.add_column("z", logits), "image", plain.labels, NAMES, plain.augmentation, plain.images
    )
    column = ColumnTeacher("z", rows)
    with pytest.raises(ValueError, match="z have one answer per row and cannot answer augmented views"):
        get(TeacherCache(tmp_path), [column], rows, views=2)
    found = everything(get(TeacherCache(tmp_path), [column], rows), rows, -1)[0]
    assert torch.allclose(found, torch.tensor(logits), atol=4e-3)


def test_too_little_memory_halves_the_batch_and_says_so(tmp_path):
    class Hungry(Tiny):
        def forward(self, x):
            if len(x) > 8:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return super().forward(x)

    hungry = TorchTeacher(Hungry(), feed(), name="hungry", data_names=NAMES, class_names=NAMES)
    rows, said = image_rows(), []
    outputs = get(TeacherCache(tmp_path), [hungry], rows, batch_size=32, on_message=said.append)
    assert [line for line in said if line.startswith("Memory")] == [
        f"Memory does not suffice for teacher 'hungry': going on with batches of {size} rows." for size in (16, 8)
    ]
    assert torch.allclose(everything(outputs, rows, -1), LiveOutputs([teacher()], rows).lookup(
        torch.arange(50), torch.full((50,), -1)), atol=2e-3)  # fmt: skip

    class Other(Tiny):
        def forward(self, x):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    other = TorchTeacher(Other(), feed(), name="other", data_names=NAMES, class_names=NAMES)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        get(TeacherCache(tmp_path), [other], rows)


def test_says_what_it_will_take_and_refuses_where_the_disk_is_full(tmp_path, monkeypatch):
    said = []
    get(TeacherCache(tmp_path), [teacher()], image_rows(), views=3, batch_size=8, on_message=said.append)
    assert said[0].startswith("Teacher outputs to compute: 3 files, 1.2 kB, into ")
    assert re.match(r"Teacher 'one': about \d+ s for 3 file\(s\) of 50 rows", said[1])
    assert estimate(4, 50_000, 10, 6).bytes == 4 * 6 * 50_000 * 10 * 2 and estimate(4, 50_000, 10, 6).files == 24
    assert estimate(1, 10, 1000, 0, "topk", 10).bytes == 10 * (10 * 2 + 10 * 2 + 2)
    monkeypatch.setattr("hf_hpmkd.teacher_cache.shutil.disk_usage", lambda _: _Full)
    with pytest.raises(OSError, match=r"need 1 files, 400 bytes, but only 9 bytes are free .*topk.*live"):
        get(TeacherCache(tmp_path), [teacher(5)], image_rows())
    assert get(TeacherCache(tmp_path), [teacher()], image_rows(), views=3).hits == 3  # nothing to write: no refusal


class _Full:
    free = 9


# ---- the key ---------------------------------------------------------------------------------------------------------


def test_second_time_runs_no_teacher(tmp_path):
    rows, one = image_rows(), teacher()
    first = get(TeacherCache(tmp_path), [one], rows, views=2)
    calls = one.model.calls
    second = get(TeacherCache(tmp_path), [one], rows, views=4)
    assert (first.hits, first.misses, second.hits, second.misses) == (0, 2, 2, 2)
    assert one.model.calls == 2 * calls
    assert get(TeacherCache(tmp_path), [one, teacher(name="renamed")], rows, views=4).hits == 4  # twice the same


def other_class(model):
    model.head.weight.data[0, 0] += 1e-3
    return model


@pytest.mark.parametrize(
    "changed",
    {
        "weights": lambda: ([TorchTeacher(other_class(Tiny()), feed(), name="one", data_names=NAMES)], image_rows()),
        "class order": lambda: ([teacher(class_names=NAMES[::-1])], image_rows()),
        "row contents": lambda: ([teacher()], image_rows(seed=1)),
        "row order": lambda: ([teacher()], image_rows().subset([1, 0, *range(2, 50)])),
        "number of rows": lambda: ([teacher()], image_rows().subset(range(49))),
        "feed": lambda: ([TorchTeacher(Tiny(), feed(0.4), name="one", data_names=NAMES)], image_rows()),
        "augmentation seed": lambda: ([teacher()], image_rows(augmentation_seed=4)),
        "precision": lambda: (
            [TorchTeacher(Tiny(), feed(), name="one", data_names=NAMES, dtype=torch.bfloat16)],
            image_rows(),
        ),
    }.items(),
    ids=lambda pair: pair[0],
)
@pytest.mark.filterwarnings("ignore:The teacher's classes have no names")
def test_each_change_is_another_file(tmp_path, changed):
    cache = TeacherCache(tmp_path)
    get(cache, [teacher()], image_rows(), views=1)
    teachers, rows = changed[1]()
    again = get(cache, teachers, rows, views=1)
    assert (again.hits, again.misses) == (0, 1) and len(files(cache)) == 2


def test_view_and_mode_are_other_files(tmp_path):
    cache = TeacherCache(tmp_path)
    get(cache, [teacher()], image_rows(), views=2)
    get(cache, [teacher()], image_rows(), views=0)
    get(cache, [teacher()], image_rows(), views=0, mode="topk", topk=1)
    get(cache, [teacher()], image_rows(), views=0, mode="topk", topk=2)
    assert len(files(cache)) == 5
    # The augmentation says nothing about rows that are not augmented.
    assert get(cache, [teacher()], image_rows(augmentation_seed=9), views=0).hits == 1


def test_a_copy_of_the_data_elsewhere_is_the_same_file(tmp_path):
    cache = TeacherCache(tmp_path / "cache")
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        outputs = get(cache, [teacher()], image_rows(folder=tmp_path / place), views=1)
    assert outputs.hits == 1 and len(files(cache)) == 1


# ---- damage, stops, several processes --------------------------------------------------------------------------------


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["data", "metadata", "header length", "truncated", "empty", "no safetensors"])
def test_damaged_file_is_rebuilt_with_a_warning(tmp_path, damage):
    cache, rows, one = TeacherCache(tmp_path), image_rows(), teacher()
    expected = everything(get(cache, [one], rows), rows, -1)
    [path] = files(cache)
    content = path.read_bytes()
    if damage == "data":
        flip(path, -7)
    elif damage == "metadata":
        flip(path, content.index(b"view") + 7)
    elif damage == "header length":
        flip(path, 1)
    elif damage == "truncated":
        path.write_bytes(content[:-100])
    else:
        path.write_bytes(b"" if damage == "empty" else b"garbage" * 99)
    assert len(cache.damaged()) == 1 and "1 files checked, 1 damaged" in cache.verify()
    assert cache.ls().splitlines()[-1].startswith("1 files")  # which reads only the header
    with pytest.warns(UserWarning, match="stored outputs of teacher 'one' are damaged .* computed again"):
        again = get(cache, [one], rows)
    assert again.misses == 1 and torch.equal(everything(again, rows, -1), expected)
    assert not cache.damaged() and get(cache, [one], rows).hits == 1


def test_every_byte_counts(tmp_path):
    """A bit flipped anywhere in the file is noticed (every third byte, to save time)."""
    cache = TeacherCache(tmp_path)
    get(cache, [teacher()], image_rows(3))
    [path] = files(cache)
    for place in range(0, len(path.read_bytes()), 3):
        flip(path, place)
        assert cache.damaged(), place
        flip(path, place)
    assert not cache.damaged()


def test_a_file_under_another_name_is_not_believed(tmp_path):
    cache, rows = TeacherCache(tmp_path), image_rows()
    get(cache, [teacher(0)], rows)
    [first] = files(cache)
    get(cache, [teacher(1)], rows)
    [second] = [path for path in files(cache) if path != first]
    second.write_bytes(first.read_bytes())
    with pytest.warns(UserWarning, match="something else than its name says"):
        outputs = get(cache, [teacher(1)], rows)
    assert torch.allclose(everything(outputs, rows, -1)[0], LiveOutputs([teacher(1)], rows).lookup(
        torch.arange(50), torch.full((50,), -1))[0], atol=2e-3)  # fmt: skip


def slow_teachers(seconds):
    return [teacher(seed, str(seed), seconds=seconds) for seed in range(2)]


def capture_slowly(folder, seconds=0.0):
    """What the processes of these tests do: six files, five batches each."""
    return get(TeacherCache(folder / "cache"), slow_teachers(seconds), image_rows(), views=3, batch_size=10)


def in_turn(outputs):
    """The outputs of all rows, the views in turn."""
    chosen = torch.arange(50)
    return outputs.lookup(chosen, chosen % 3)


def capture_with_another(folder, number):
    """Starts when the other process is there too, and leaves its misses and the sum of its outputs."""
    torch.set_num_threads(1)
    (folder / f"ready-{number}").touch()
    while len(list(folder.glob("ready-*"))) < 2:
        time.sleep(0.01)
    outputs = capture_slowly(folder, 0.03)
    (folder / f"result-{number}").write_text(f"{outputs.misses} {float(in_turn(outputs).double().sum())}")


def forked(function, *arguments):
    """A process of its own that has imported everything already."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments, daemon=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        process.start()
    return process


def fork(function, *arguments):
    return forked(function, *arguments).join


def fresh(function, *arguments):
    """A new interpreter, as a second user of the machine would start it."""
    tests = Path(__file__).parent
    words = ", ".join(repr(str(argument)) for argument in arguments[1:])
    script = (
        f"import sys; sys.path.insert(0, {str(tests)!r}); import pathlib, test_teacher_cache as t; "
        f"t.{function.__name__}(pathlib.Path({str(arguments[0])!r}), {words})"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tests.parent)}
    return subprocess.Popen([sys.executable, "-c", script], env=environment).wait


@pytest.mark.parametrize(
    "start", [fork, pytest.param(fresh, marks=pytest.mark.slow)], ids=lambda start: start.__name__
)  # importing takes ten seconds per interpreter
def test_two_processes_share_the_work_and_both_are_right(tmp_path, start):
    waits = [start(capture_with_another, tmp_path, number) for number in range(2)]
    for wait in waits:
        wait(timeout=240)
    misses, sums = zip(*((tmp_path / f"result-{n}").read_text().split() for n in range(2)), strict=True)
    assert sum(map(int, misses)) == 6 and min(map(int, misses)) >= 1, misses  # every file once, and nobody idle
    expected = float(in_turn(capture_slowly(tmp_path / "alone")).double().sum())
    assert [float(total) for total in sums] == pytest.approx([expected] * 2, rel=1e-6)


def capture_and_die(folder):
    """Killed in the middle of the second file: its bytes are written, its name is not given yet."""
    given = []

    def replace(source, target):
        if given:
            os.kill(os.getpid(), signal.SIGKILL)
        given.append(os.rename(source, target))

    teacher_output_file.os.replace = replace
    capture_slowly(folder)


def test_killed_writer_leaves_nothing_broken(tmp_path):
    process = forked(capture_and_die, tmp_path)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    cache = TeacherCache(tmp_path / "cache")
    assert len(files(cache)) == 1 and not cache.damaged()
    assert len(list(cache.root.glob("*.tmp"))) == 1
    outputs = capture_slowly(tmp_path)
    assert (outputs.hits, outputs.misses) == (1, 5)
    assert torch.equal(in_turn(outputs), in_turn(capture_slowly(tmp_path / "alone")))
    assert not list(cache.root.glob("*.tmp"))


def test_lock_of_a_killed_process_blocks_nobody(tmp_path):
    process = forked(capture_slowly, tmp_path, 0.5)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("cache/*.lock")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join(60)
    outputs = capture_slowly(tmp_path)
    assert outputs.hits + outputs.misses == 6 and outputs.misses >= 1


def hold_then_release(path, ready, enough):
    with FileLock(path):
        ready.set()
        enough.wait(60)


def test_a_busy_file_is_left_for_last_and_waited_for(tmp_path):
    cache, rows, one = TeacherCache(tmp_path), image_rows(), teacher()
    get(cache, [one], rows, views=3)
    by_view = {entry.view: entry.path for entry in cache.entries()}
    for path in by_view.values():
        path.unlink()
    ready, enough = (multiprocessing.get_context("fork").Event() for _ in range(2))
    holder = forked(hold_then_release, by_view[0].with_suffix(".lock"), ready, enough)
    assert ready.wait(60)
    said = []

    def listen(line):
        said.append(line)
        if line.startswith("Waiting"):
            enough.set()

    outputs = get(cache, [one], rows, views=3, on_message=listen)
    holder.join(60)
    assert outputs.misses == 3 and "Waiting for another process that computes 1 of the files." in said
    written = {view: path.stat().st_ctime_ns for view, path in by_view.items()}
    assert written[0] > max(written[1], written[2])


# ---- the folder ------------------------------------------------------------------------------------------------------


def test_ls_and_clear(tmp_path):
    cache = TeacherCache(tmp_path / "cache")
    assert "No teacher outputs" in cache.ls() and cache.clear().startswith("0 files deleted")
    get(cache, [teacher()], image_rows(), views=2)
    get(cache, [teacher(1, "two")], image_rows())
    (cache.root / "mine.txt").write_text("not yours")
    (cache.root / "model.safetensors").write_text("not yours either")
    old, *others = files(cache)
    os.utime(old, (time.time() - 9 * 86400,) * 2)
    entries = cache.entries()
    assert [(e.rows, e.classes, e.mode) for e in entries] == [(50, K, "full")] * 3
    assert sorted(e.teacher for e in entries) == ["one", "one", "two"]
    assert entries[-1].path == old
    assert "3 files, " in cache.ls() and "two" in cache.ls()
    assert cache.verify() == "3 files checked, 0 damaged."
    assert cache.clear(older_than=5).startswith("1 files deleted")
    assert files(cache) == others
    assert cache.clear().startswith("2 files deleted")
    assert sorted(path.name for path in cache.root.iterdir()) == ["mine.txt", "model.safetensors"]


def test_clear_takes_what_a_killed_writer_left_and_what_stands_behind_it(tmp_path):
    cache = TeacherCache(tmp_path)
    get(cache, [teacher()], image_rows())
    [path] = files(cache)
    for name in ("0" * 64 + ".123.tmp", "0" * 64 + ".lock"):
        (tmp_path / name).touch()
    assert cache.clear().startswith("1 files deleted") and not list(tmp_path.iterdir())


def test_using_a_file_keeps_it_from_being_cleared(tmp_path):
    cache = TeacherCache(tmp_path)
    get(cache, [teacher()], image_rows())
    [path] = files(cache)
    os.utime(path, (0, 0))
    get(cache, [teacher()], image_rows())
    assert cache.clear(older_than=1).startswith("0 files deleted")


def test_a_file_that_may_only_be_read_is_used(tmp_path, monkeypatch):
    rows, one = image_rows(), teacher()
    expected = everything(get(TeacherCache(tmp_path), [one], rows), rows, -1)
    calls = one.model.calls

    def refuse(*words, **settings):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refuse)
    again = get(TeacherCache(tmp_path), [one], rows)
    assert (again.hits, again.misses, one.model.calls) == (1, 0, calls)
    assert torch.equal(everything(again, rows, -1), expected)


def test_default_folder(monkeypatch):
    monkeypatch.setenv("HPMKD_CACHE", "/somewhere/else")
    assert TeacherCache().root == Path("/somewhere/else")
    monkeypatch.delenv("HPMKD_CACHE")
    monkeypatch.setenv("HPMKD_MEMORY", "/somewhere/memory")
    assert TeacherCache().root == Path("/somewhere/memory/teacher_outputs")
    monkeypatch.delenv("HPMKD_MEMORY")
    assert TeacherCache().root.parts[-3:] == ("hpmkd", "memory", "teacher_outputs")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of mapped files")
def test_files_are_mapped_not_loaded(tmp_path):
    outputs = get(TeacherCache(tmp_path), [teacher()], image_rows())
    [path] = files(TeacherCache(tmp_path))
    assert str(path) in Path("/proc/self/maps").read_text()
    assert outputs.nbytes < path.stat().st_size
